"""Depth is told for every token of a prompt and its continuation, and drawn where the patches are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.depth import token_depth
from fuyu_e2e.inference.depth_map import WIDTH, colour, depth_map
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.block import routed_blocks


def question(builder: SequenceBuilder, png: bytes) -> Document:
    return Document("key", (Image(png), Text("What is it?", loss=False)))


def test_depth_is_that_of_the_whole_sequence_read_at_once(
    routed_decoder: Callable[..., Decoder], builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    decoder = routed_decoder(share=0.4)
    prompt = builder.prompt(question(builder, make_png(20, 33)))
    [written] = generate(decoder, [prompt], max_new_tokens=7, eos_id=-1)
    depth = token_depth(decoder, prompt, written)
    assert depth.passed.shape == (2, len(prompt) + 7)
    with torch.no_grad():
        batch = pack_row([prompt])
        row = decoder.row(batch)
        decoder.logits(batch, row)
    passed = torch.stack([routed.passed for routed in routed_blocks(row)])
    assert torch.equal(depth.counts[: len(prompt)], passed.sum(dim=0))
    assert set(depth.shares) == {"patches", "newlines", "text", "answers"}
    patches = depth.passed[:, torch.from_numpy(prompt.patch_positions)].float().mean()
    assert depth.shares["patches"] == pytest.approx(float(patches))
    assert depth.shares["answers"] == pytest.approx(float(depth.passed[:, len(prompt) :].float().mean()))


def test_a_dense_model_has_no_depth_to_show(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    with pytest.raises(UserError, match="every token passes every block"):
        token_depth(decoder, builder.prompt(question(builder, make_png(8, 8))), [])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 400), (300, 5), (61, 90)])
def test_the_map_shows_each_patch_in_its_colour(
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    make_png: Callable[..., bytes],
    height: int,
    width: int,
) -> None:
    decoder = routed_decoder(share=0.4)
    prompt = builder.prompt(question(builder, make_png(height, width)))
    depth = token_depth(decoder, prompt, [5, 6])
    picture = np.asarray(depth_map(depth, builder.tokenizer))
    assert picture.shape[1] == WIDTH
    assert picture.shape[0] < 1_000
    shown = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {colour(count / 2) for count in range(3)} <= shown, "the legend lacks a colour"


def test_more_depth_is_darker() -> None:
    brightness = [sum(colour(share / 20)) for share in range(21)]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 21
