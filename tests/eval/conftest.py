"""A small model as it is stored, and questions about random pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.checkpoint.loading import StoredModel, TrainedModel
from fuyu_e2e.checkpoint.metadata import ModelMetadata, Provenance
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.eval.question import Question
from fuyu_e2e.export.folders import export_own
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder


@pytest.fixture(scope="session")
def model(decoder: Decoder, builder: SequenceBuilder) -> TrainedModel:
    return TrainedModel(decoder, builder, step=7)


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, config: FuyuConfig, decoder: Decoder, builder: SequenceBuilder
) -> Path:
    """The folder of that model."""
    folder = tmp_path_factory.mktemp("models") / "own"
    metadata = ModelMetadata(config, builder.tokenizer, builder.images)
    export_own(StoredModel(folder, metadata, dict(decoder.state_dict()), Provenance(step=7)), folder)
    return folder


@pytest.fixture(scope="session")
def make_question(make_png: Callable[..., bytes]) -> Callable[..., Question]:
    """Makes the question of a number; one with the same image name is about the same picture."""

    def make(number: int, **changed: Any) -> Question:
        image = changed.pop("image", f"image{number}")
        name = int("".join(filter(str.isdigit, image)) or 0)
        picture = changed.pop("picture", make_png(6 + name % 5, 9 + name % 7, seed=name))
        settings = {
            "document": Document(f"q{number}", (Image(picture), Text("What is it?", loss=False))),
            "references": (str(number),),
            "choices": (str(number), "a red square", "19"),
            "image": image,
            "groups": {"parity": "even" if number % 2 == 0 else "odd"},
        }
        return Question(**settings | changed)

    return make
