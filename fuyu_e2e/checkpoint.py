"""What a checkpoint says about itself: the model, the tokenizer and the images it was trained on.

Lightning's checkpoint carries the section that `describe` makes, so that a file is all that generation, evaluation
and export need. It holds tensors and primitives only, and reading it never runs code.
"""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuyu_e2e import __version__
from fuyu_e2e.errors import UserError
from fuyu_e2e.image import ImagePolicy
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.sequence import SequenceBuilder
from fuyu_e2e.tokenizer import Tokenizer

SECTION = "fuyu_e2e"
"""The key of our section in a Lightning checkpoint."""
WEIGHTS_PREFIX = "decoder."
"""What stands before the decoder's own names in the checkpoint's weights."""


@dataclass(frozen=True)
class Description:
    """Everything but the weights."""

    config: FuyuConfig
    tokenizer: Tokenizer
    images: ImagePolicy

    def section(self) -> dict[str, Any]:
        """The description as tensors and primitives, to be stored under `SECTION`."""
        return {
            "version": __version__,
            "decoder": asdict(self.config),
            "tokenizer": torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8),
            "images": asdict(self.images),
        }

    @classmethod
    def of(cls, checkpoint: dict[str, Any], source: str) -> "Description":
        """Reads the section of a loaded checkpoint; `source` is the file that an error names.

        Raises:
            UserError: The checkpoint was not written by this project, or by an incompatible version of it.
        """
        if SECTION not in checkpoint:
            raise UserError(f"{source} is no checkpoint of fuyu-e2e: it doesn't say which model it holds.")
        section = checkpoint[SECTION]
        try:
            return cls(
                FuyuConfig.from_dict(section["decoder"]),
                Tokenizer(section["tokenizer"].numpy().tobytes()),
                ImagePolicy(**section["images"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{source} was written by fuyu-e2e {section.get('version')}, whose settings version {__version__} "
                f"can't read ({error}): install that version."
            ) from error

    def check_same(self, other: "Description", source: str) -> None:
        """Refuses to go on from a checkpoint (`other`, read from `source`) of another configuration.

        Raises:
            UserError: Names every setting that differs, or the tokenizer.
        """
        mine, theirs = asdict(self.config), asdict(other.config)
        differing = [
            f"decoder.{name} is {mine[name]} but {theirs[name]} there" for name in mine if mine[name] != theirs[name]
        ]
        if differing:
            raise UserError(
                f"{source} holds another model ({'; '.join(differing)}): train on with the settings it was made "
                "with, or start a new run in a directory of its own."
            )
        if self.tokenizer.digest != other.tokenizer.digest:
            raise UserError(
                f"{source} was trained with another tokenizer than data.tokenizer names: its ids mean other words. "
                "Name the tokenizer it was trained with."
            )


@dataclass(frozen=True)
class TrainedModel:
    """A decoder in evaluation mode, with what it takes to prompt it."""

    decoder: Decoder
    builder: SequenceBuilder
    step: int
    """Optimizer steps it was trained for."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was trained with."""
        return self.builder.tokenizer


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` names: itself, or the newest one in a run's directory.

    Raises:
        UserError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path} is no checkpoint file, and no directory that holds one (*.ckpt).")
    return found[-1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Lightning's checkpoint as a dictionary of tensors and primitives; nothing in it is ever run.

    Raises:
        UserError: The file is not a checkpoint, is damaged, or holds code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} can't be read as a checkpoint ({str(error).splitlines()[0]}): it is damaged or something else. "
            "Name another checkpoint."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


def load_model(path: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """The trained model of a checkpoint file, or of the newest one in a run's directory.

    Raises:
        UserError: There is no checkpoint, it can't be read, or its weights don't fit its own description.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    description = Description.of(checkpoint, str(file))
    weights: dict[str, Tensor] = {
        name.removeprefix(WEIGHTS_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    with torch.device("meta"):
        decoder = Decoder(description.config)
    try:
        decoder.to_empty(device=device).load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{file}: its weights don't fit the model that it describes: {error}") from error
    builder = SequenceBuilder(description.tokenizer, description.images)
    return TrainedModel(decoder.eval(), builder, int(checkpoint["global_step"]))
