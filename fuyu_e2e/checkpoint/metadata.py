"""What stored weights say about themselves: the model, its tokenizer and images, and how it was trained."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.image_layout import ImagePolicy
from fuyu_e2e.version import __version__

SECTION = "fuyu_e2e"
"""The key of our section in a Lightning checkpoint."""


@dataclass(frozen=True)
class ModelMetadata:
    """Everything but the weights that it takes to run a model."""

    config: FuyuConfig
    tokenizer: Tokenizer
    images: ImagePolicy

    @property
    def builder(self) -> SequenceBuilder:
        """What turns documents into the sequences that the model reads."""
        return SequenceBuilder(self.tokenizer, self.images, self.config.connector)

    def settings(self) -> dict[str, Any]:
        """Returns the description without the tokenizer, in primitives."""
        return {"version": __version__, "decoder": self.config.to_dict(), "images": asdict(self.images)}

    @classmethod
    def of_settings(cls, settings: dict[str, Any], tokenizer: Tokenizer, source: str) -> "ModelMetadata":
        """The inverse of `settings`; `source` is the file that an error names.

        Raises:
            UserError: They were written by an incompatible version of this project.
        """
        try:
            decoder, images = (_listed_as_tuples(settings[part]) for part in ("decoder", "images"))
            return cls(FuyuConfig.from_dict(decoder), tokenizer, ImagePolicy(**images))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{source} was written by fuyu-e2e {settings.get('version')}, whose settings version {__version__} "
                f"can't read ({error}): install that version."
            ) from error

    def section(self) -> dict[str, Any]:
        """Returns the description as tensors and primitives, to be stored under `SECTION`."""
        return self.settings() | {
            "tokenizer": torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8),
        }

    @classmethod
    def of(cls, checkpoint: dict[str, Any], source: str) -> "ModelMetadata":
        """Reads the section of a loaded checkpoint; `source` is the file that an error names.

        Raises:
            UserError: The checkpoint was not written by this project, or by an incompatible version of it.
        """
        if SECTION not in checkpoint:
            raise UserError(f"{source} is no checkpoint of fuyu-e2e: it doesn't say which model it holds.")
        section = checkpoint[SECTION]
        return cls.of_settings(section, Tokenizer(section["tokenizer"].numpy().tobytes()), source)

    def check_same(self, other: "ModelMetadata", source: str) -> None:
        """Refuses to go on from weights (`other`, read from `source`) of another configuration.

        Raises:
            UserError: Names the tokenizer, whose vocabulary a named size takes, or every setting that differs.
        """
        if self.tokenizer.digest != other.tokenizer.digest:
            raise UserError(
                f"{source} was trained with another tokenizer than data.tokenizer names: its ids mean other words. "
                "Name the tokenizer it was trained with."
            )
        mine, theirs = self.config.to_dict(), other.config.to_dict()
        differing = [
            f"decoder.{name} is {mine[name]} but {theirs[name]} there" for name in mine if mine[name] != theirs[name]
        ]
        if differing:
            raise UserError(
                f"{source} holds another model ({'; '.join(differing)}): train on with the settings it was made "
                "with, or start a new run in a directory of its own."
            )


def _listed_as_tuples(value: Any) -> Any:
    """Settings as they were before JSON made lists of their tuples."""
    if isinstance(value, dict):
        return {name: _listed_as_tuples(inner) for name, inner in value.items()}
    return tuple(map(_listed_as_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How weights came about, in primitives: what a model's card tells."""

    step: int = 0
    """Optimizer steps."""
    tokens_seen: int = 0
    """Tokens of documents trained on."""
    data: dict[str, str] = field(default_factory=dict)
    """By source, the sha256 over the checksums of all its shards, in the order of the manifest."""
    validation: dict[str, float] = field(default_factory=dict)
    """The figures of the last validation, by their names in TensorBoard."""
    documents: dict[str, int] = field(default_factory=dict)
    """Usable documents of the training shards by kind (`caption`, `chat`, `interleaved`, `text`); empty where the
    checkpoint doesn't say."""
    averaged: bool = False
    """Whether these are averaged weights (EMA), not those that the optimizer left."""
