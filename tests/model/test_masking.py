"""Patch masking: which patches a learnt embedding replaces, and that it does so in training alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.transformers import to_transformers
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder, Inputs
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.model.images.masking import PatchMasking
from fuyu_e2e.model.row import TrainingProgress

ALWAYS = PatchMasking(images=1.0, share=1.0)


@pytest.fixture(scope="module")
def sequences(builder: SequenceBuilder, make_png: Callable[..., bytes]) -> list[TokenSequence]:
    """Text, one image, and two images of one shape with text between."""
    one, other = (Image(make_png(24, 36, seed=seed)) for seed in (1, 2))
    segments = [(Text("4072"),), (one, Text("7")), (Text("1"), one, Text("a"), other, Text("19 8 3"))]
    return [builder.build(Document(f"doc{number}", parts)) for number, parts in enumerate(segments)]


@pytest.fixture
def masking(decoder: Decoder) -> Decoder:
    """The same weights, all patches of which may be masked, and an embedding that isn't zero."""
    made = Decoder(replace(decoder.config, patch_masking=ALWAYS))
    made.load_state_dict(decoder.state_dict() | {"masked_patches.embedding": torch.linspace(-1, 1, 48)})
    return made.eval()


def drawn(masking: PatchMasking, sequences: list[TokenSequence], step: int) -> dict[str, list[bool]]:
    """The mask of each document of a row."""
    masked = masking.draw(pack_row(sequences), step).tolist()
    found = {}
    for sequence in sequences:
        places = sum(span.places for span in sequence.images)
        found[sequence.key], masked = masked[:places], masked[places:]
    assert not masked
    return found


def test_as_many_are_masked_as_asked() -> None:
    """In 3,000 steps of a row of one image of 400 patches: of 0.4 of the images, from none up to half, evenly."""
    tokens = np.zeros(420, np.int64)
    sequence = TokenSequence(
        key="key",
        tokens=tokens,
        loss=np.ones(420, bool),
        patches=np.zeros((400, 48), np.uint8),
        images=(ImageSpan.of_grid(0, 20, 20),),
    )
    batch, masking = pack_row([sequence]), PatchMasking(images=0.4, share=0.5)
    shares = np.array([masking.draw(batch, step).mean() for step in range(3_000)])
    some = shares[shares > 0]
    assert len(some) / len(shares) == pytest.approx(0.4, abs=0.03)
    assert some.mean() == pytest.approx(0.25, abs=0.02)
    assert np.histogram(some, 5, (0, 0.5))[0] / len(some) == pytest.approx([0.2] * 5, abs=0.05)
    places = np.mean([masking.draw(batch, step) for step in range(3_000)], axis=0)
    assert places == pytest.approx(np.full(400, 0.1), abs=0.035)


def test_a_document_has_the_same_mask_in_any_row(sequences: list[TokenSequence]) -> None:
    """In the same step; in others, other ones, and its images differ."""
    text, one, two = sequences
    together = drawn(ALWAYS, [text, one, two], 5)
    assert drawn(ALWAYS, [two, text, one], 5) == together
    assert drawn(ALWAYS, [two], 5) | drawn(ALWAYS, [one, text], 5) == together
    half = len(together["doc2"]) // 2
    assert together["doc2"][:half] != together["doc2"][half:]
    assert together["doc1"] != together["doc2"][:half]
    assert len({tuple(drawn(ALWAYS, [two], step)["doc2"]) for step in range(50)}) > 45


@torch.no_grad()
def test_the_learnt_embedding_stands_in_exactly_where_it_is_drawn(
    masking: Decoder, sequences: list[TokenSequence]
) -> None:
    batch = pack_row(sequences, 200)
    masked = torch.from_numpy(ALWAYS.draw(batch, 3))
    assert 0 < masked.sum() < len(masked)
    states = masking.embed_images(batch.patches, batch.images)
    inputs = Inputs(batch.tokens, patch_positions=batch.patch_positions)
    plain, found = (masking.embed(inputs._replace(masked=mask), states) for mask in (None, masked))
    embedding, places = masking.get_parameter("masked_patches.embedding"), batch.patch_positions[masked]
    assert torch.equal(found[places], embedding.expand(len(places), -1))
    others = torch.ones(len(batch.tokens), dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(found[others], plain[others])


@torch.no_grad()
def test_only_training_masks(masking: Decoder, decoder: Decoder, sequences: list[TokenSequence]) -> None:
    """By the step that training is in; nothing is masked in evaluation."""
    batch = pack_row(sequences)
    plain = decoder.loss(batch)
    assert torch.equal(masking.loss(batch), plain)
    masking.train()
    losses: list[Tensor] = []
    for step in (3, 3, 4):
        masking.progress = TrainingProgress(step=step)
        losses.append(masking.loss(batch))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], plain)


def test_a_row_of_text_gives_the_learnt_embedding_a_gradient(masking: Decoder, sequences: list[TokenSequence]) -> None:
    """Of zero; else a rank with text alone would wait for ever for the others, or they for it."""
    masking.train().loss(pack_row(sequences[:1])).backward()
    gradient = masking.get_parameter("masked_patches.embedding").grad
    assert gradient is not None
    assert (gradient == 0).all()
    masking.loss(pack_row(sequences)).backward()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["images", "share"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_a_part_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"decoder\.patch_masking\.{name} is {value}.* above 0 and at most 1"):
        PatchMasking(**{name: value})


def test_a_decoder_trained_with_it_is_exported_like_one_without(masking: Decoder, decoder: Decoder) -> None:
    given, expected = (to_transformers(one.state_dict(), one.config) for one in (masking, decoder))
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_settings_survive_as_primitives(config: FuyuConfig) -> None:
    whole = replace(config, patch_masking=PatchMasking(images=0.5, share=0.2))
    assert FuyuConfig.from_dict(whole.to_dict()) == whole
