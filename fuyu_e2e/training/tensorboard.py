"""TensorBoard's curves, which a full disk holds up and which end no run."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter


def tensorboard_of(trainer: pl.Trainer) -> TensorBoardLogger | None:
    """Returns the logger that takes texts and pictures, also where a recipe names others before it."""
    return next((one for one in trainer.loggers if isinstance(one, TensorBoardLogger)), None)


def shown_step(trainer: pl.Trainer) -> int:
    """Returns where curves have what belongs to the step that was done last: as Lightning, they count steps from 0."""
    return trainer.global_step - 1


def leave_out_later(trainer: pl.Trainer) -> None:
    """Has TensorBoard show no points of steps that a run which goes on is about to do again, by `purge_step`.

    They are there where the run was killed after its last checkpoint, or goes back to an earlier one.
    """
    logger = tensorboard_of(trainer)
    if trainer.is_global_zero and trainer.global_step and logger is not None:
        logger.experiment.purge_step = trainer.global_step


class Curves(TensorBoardLogger):
    """Lightning's TensorBoard logger, whose run goes on where its disk is full or fails.

    TensorBoard's thread ends at its first failure to write, which the trainer then hears of in whatever it logs next.
    Its file appears with the first curve: Lightning asks for the writer at each start, also at one that is refused.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's own writer."""
        if self._experiment is None:
            self._experiment = LateWriter(self.log_dir, **self._kwargs)
        return self._experiment


class LateWriter(SummaryWriter):
    """Opens its file, a `PatientFile`, when there is something to write."""

    _made = False

    def __init__(self, log_dir: str, **options: Any) -> None:
        super().__init__(log_dir, **options)
        self._made = True

    def _get_file_writer(self) -> Any:
        if not self._made:
            return None  # torch opens it as the writer is made
        closed = self.file_writer is None
        file_writer = super()._get_file_writer()
        if closed:
            events = file_writer.event_writer
            events._async_writer._writer._writer = PatientFile(Path(events._file_name))
        return file_writer


class PatientFile:
    """A file that is only ever added to, and keeps in memory what the disk has no room for until it has.

    Args:
        path: Of a file that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        self._size = path.stat().st_size
        self._waiting = bytearray()
        self._warned = False

    def write(self, data: bytes) -> None:
        """Adds some bytes, or has them wait behind those that do."""
        self._waiting += data
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError as error:
            # A record cut in two would hide all that comes behind it.
            os.truncate(self.path, self._size)
            if not self._warned:
                rank_zero_warn(
                    f"{self.path} could not be written ({error}): training goes on, and its curves wait in memory "
                    "until there is room. Make room on the disk."
                )
            self._warned = True
        else:
            self._size += len(self._waiting)
            self._waiting.clear()

    def flush(self) -> None:
        """Tries once more to write what waits."""
        self.write(b"")

    def close(self) -> None:
        """Takes no more."""
        self.flush()
        self.closed = True
