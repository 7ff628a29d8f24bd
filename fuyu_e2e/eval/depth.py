"""How much depth a routed model gives to its input: by token type, and to ink against empty ground."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from rich.table import Table

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.image import PADDING
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.eval.question import Question
from fuyu_e2e.inference.depth import TokenDepth, token_depth

DARK = 128
"""Brightness below which a pixel counts as ink."""


def answer_depths(model: TrainedModel, questions: Sequence[Question], answers: Sequence[str]) -> list[TokenDepth]:
    """Returns the depth of every token of some questions and of their generated answers; empty for a dense model.

    Raises:
        UnusableSampleError: An image can't be used.
    """
    if model.decoder.config.routing is None:
        return []
    return [
        token_depth(model.decoder, model.builder.prompt(question.document), model.tokenizer.encode(answer))
        for question, answer in zip(questions, answers, strict=True)
    ]


def depth_shares(depths: Sequence[TokenDepth]) -> dict[str, float]:
    """Returns the fraction of routed blocks passed by token type; for patches also split by ink."""
    passed = torch.cat([depth.passed for depth in depths], dim=1).float().mean(dim=0).numpy()
    kinds = [np.array(depth.kind_names, dtype=object) for depth in depths]
    for names, depth in zip(kinds, depths, strict=True):
        ink = has_ink(depth.sequence)
        places = depth.sequence.patch_positions
        if len(places) == len(ink):  # else patches don't correspond to tokens
            names[places] = np.where(ink, "patches_with_ink", "patches_without_ink")
    names = np.concatenate(kinds)
    shares = {name: float(passed[names == name].mean()) for name in sorted(set(names.tolist()))}
    patches = np.array([name.startswith("patches") for name in names.tolist()])
    return {"patches": float(passed[patches].mean()), **shares}


def depth_table(shares: Mapping[str, float]) -> Table:
    """Returns these fractions as a table."""
    table = Table("share of the routed blocks passed by", "")
    for name, share in shares.items():
        table.add_row(name.replace("_", " "), f"{share:.1%}")
    return table


def has_ink(sequence: TokenSequence) -> Bool[np.ndarray, " P"]:
    """Returns whether each patch contains ink, for pictures with dark ink on light ground."""
    pixels: UInt8[np.ndarray, "P pixels 3"] = sequence.patches.reshape(len(sequence.patches), -1, 3)
    padding = (pixels == PADDING).all(axis=-1)
    return ((pixels.mean(axis=-1) < DARK) & ~padding).any(axis=-1)
