"""Depth by kind of token, and ink told from ground and from padding."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.eval.depth import answer_depths, depth_shares, has_ink
from fuyu_e2e.eval.question import Question
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.tasks.digits import compose, load_scans


def test_ink_is_dark_and_no_padding(builder: SequenceBuilder, encode_png: Callable[[np.ndarray], bytes]) -> None:
    pixels = np.full((6, 12, 3), 200, np.uint8)
    pixels[1, 5] = 20
    sequence = builder.prompt(Document("key", (Image(encode_png(pixels)),)))
    assert has_ink(sequence).tolist() == [False, True, False, False, False, False]


def test_composed_digits_have_ink_where_they_stand(
    builder: SequenceBuilder, encode_png: Callable[[np.ndarray], bytes]
) -> None:
    rng = np.random.default_rng(0)
    pictures = [compose(rng, load_scans("val"), 2, 40, 60, warp=False)[0] for _ in range(5)]
    shares = [has_ink(builder.prompt(Document("k", (Image(encode_png(p)),)))).mean() for p in pictures]
    assert all(0.05 < share < 0.6 for share in shares)


def test_shares_are_means_over_all_tokens_of_a_kind(
    routed_decoder: Callable[..., Decoder], builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    model = TrainedModel(routed_decoder(share=0.4), builder, 0)
    questions = []
    for seed in range(6):
        document = Document(f"{seed}", (Image(make_png(9 + seed, 30, seed=seed)), Text("What is it?", loss=False)))
        questions.append(Question(document=document, references=("407",), image=document.key))
    depths = answer_depths(model, questions, ["407"] * len(questions))
    shares = depth_shares(depths)
    assert set(shares) >= {"patches", "patches_with_ink", "newlines", "text", "answers"}

    def places(sequence: TokenSequence) -> torch.Tensor:
        return torch.from_numpy(sequence.patch_positions)

    patches = torch.cat([depth.passed[:, places(depth.sequence)].flatten() for depth in depths]).float()
    answers = torch.cat([depth.passed[:, len(depth.sequence) :].flatten() for depth in depths]).float()
    assert shares["patches"] == pytest.approx(float(patches.mean()))
    assert shares["answers"] == pytest.approx(float(answers.mean()))
