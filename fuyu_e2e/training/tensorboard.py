"""TensorBoard logging that survives a full disk."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter


def tensorboard_of(trainer: pl.Trainer) -> TensorBoardLogger | None:
    """Returns the TensorBoard logger, wherever it is among the recipe's loggers; None without one."""
    return next((one for one in trainer.loggers if isinstance(one, TensorBoardLogger)), None)


def shown_step(trainer: pl.Trainer) -> int:
    """Returns the x value of the last completed step: curves count steps from 0, as Lightning does."""
    return trainer.global_step - 1


def leave_out_later(trainer: pl.Trainer) -> None:
    """Hides, by `purge_step`, the points of steps that a resumed run is about to repeat.

    Such points exist if the run was killed after its last checkpoint, or returns to an earlier one.
    """
    logger = tensorboard_of(trainer)
    if trainer.is_global_zero and trainer.global_step and logger is not None:
        logger.experiment.purge_step = trainer.global_step


class Curves(TensorBoardLogger):
    """Lightning's TensorBoard logger for a run that must survive a full or failing disk.

    TensorBoard's writer thread ends at its first failed write, and the trainer's next log call raises that error. Its
    file appears with the first point: Lightning asks for the writer at each start, even one that is refused.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer."""
        if self._experiment is None:
            self._experiment = LateWriter(self.log_dir, **self._kwargs)
        return self._experiment


class LateWriter(SummaryWriter):
    """Opens its file, a `PatientFile`, at the first write."""

    _made = False

    def __init__(self, log_dir: str, **options: Any) -> None:
        super().__init__(log_dir, **options)
        self._made = True

    def _get_file_writer(self) -> Any:
        if not self._made:
            return None  # torch opens the file in the writer's constructor
        closed = self.file_writer is None
        file_writer = super()._get_file_writer()
        if closed:
            events = file_writer.event_writer
            events._async_writer._writer._writer = PatientFile(Path(events._file_name))
        return file_writer


class PatientFile:
    """An append-only file that keeps data in memory while the disk has no room for it.

    Args:
        path: An existing file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        self._size = path.stat().st_size
        self._waiting = bytearray()
        self._warned = False

    def write(self, data: bytes) -> None:
        """Appends bytes, or queues them after those that wait already."""
        self._waiting += data
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError as error:
            # A record cut in two would hide everything after it.
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
        """Retries to write the queued bytes."""
        self.write(b"")

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        self.closed = True
