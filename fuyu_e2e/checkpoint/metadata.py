"""The description stored with weights: the model, its tokenizer and images, and how it was trained."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.components import NotImportedError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.image_layout import ImagePolicy
from fuyu_e2e.version import __version__

SECTION = "fuyu_e2e"
"""The key of our section in a Lightning checkpoint."""


@dataclass(frozen=True)
class ModelMetadata:
    """Everything but the weights that is needed to run a model."""

    config: FuyuConfig
    tokenizer: Tokenizer
    images: ImagePolicy

    @property
    def builder(self) -> SequenceBuilder:
        """Turns documents into the sequences that the model reads."""
        return SequenceBuilder(self.tokenizer, self.images, self.config.connector)

    def settings(self) -> dict[str, Any]:
        """Returns the description without the tokenizer, as primitives."""
        return {"version": __version__, "decoder": self.config.to_dict(), "images": asdict(self.images)}

    @classmethod
    def of_settings(cls, settings: dict[str, Any], tokenizer: Tokenizer, source: str) -> "ModelMetadata":
        """Returns the description that `settings` gave; `source` is the file for error messages.

        Raises:
            UserError: An incompatible version of this project wrote the settings.
        """
        try:
            decoder, images = (_listed_as_tuples(settings[part]) for part in ("decoder", "images"))
            return cls(FuyuConfig.from_dict(decoder), tokenizer, ImagePolicy(**images))
        except NotImportedError:
            raise
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
        """Returns the description in a loaded checkpoint; `source` is the file for error messages.

        Raises:
            UserError: The checkpoint is not of this project, or of an incompatible version.
        """
        if SECTION not in checkpoint:
            raise UserError(f"{source} is no checkpoint of fuyu-e2e: it doesn't say which model it holds.")
        section = checkpoint[SECTION]
        return cls.of_settings(section, Tokenizer(section["tokenizer"].numpy().tobytes()), source)

    def check_same(self, other: "ModelMetadata", source: str) -> None:
        """Refuses to continue from weights (`other`, read from `source`) of another configuration.

        Raises:
            UserError: Names the tokenizer, since a named size takes its vocabulary, or every setting that differs.
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
    """Returns settings from JSON with its lists turned back into tuples."""
    if isinstance(value, dict):
        return {name: _listed_as_tuples(inner) for name, inner in value.items()}
    return tuple(map(_listed_as_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How weights were trained, as primitives, for a model's card."""

    step: int = 0
    """Optimizer steps."""
    tokens_seen: int = 0
    """Tokens of documents trained on."""
    data: dict[str, str] = field(default_factory=dict)
    """For each source, the sha256 over the checksums of all its shards, in the manifest's order."""
    validation: dict[str, float] = field(default_factory=dict)
    """The figures of the last validation, by their names in TensorBoard."""
    documents: dict[str, int] = field(default_factory=dict)
    """Usable documents of the training shards by kind (`caption`, `chat`, `interleaved`, `text`); empty if the
    checkpoint doesn't say."""
    averaged: bool = False
    """Whether the weights are averaged (EMA) rather than the optimizer's."""
