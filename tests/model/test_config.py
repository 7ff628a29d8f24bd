"""FuyuConfig refuses what can't work and says what to change."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig, SizeName, named_size
from fuyu_e2e.model.cost import cost
from fuyu_e2e.model.decoder import Decoder

VALID = {
    "vocab_size": 320,
    "patch_size": 8,
    "layers": 2,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 16,
    "feed_forward": 128,
}


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"kv_heads": 3}, "set kv_heads to a divisor of 4"),
        ({"head_size": 15}, "make it even"),
        ({"layers": 0}, "decoder.layers is 0"),
        ({"patch_size": -8}, "decoder.patch_size is -8"),
        ({"rope_theta": 0.5}, "10000 is usual"),
        ({"norm_eps": 0.0}, "1e-6 is usual"),
        ({"dialect": "fuyu"}, "set kv_heads to 4"),
        ({"dialect": "fuyu", "kv_heads": 4, "width": 60}, "change one, or take the dialect 'qwen3'"),
        ({"dialect": "fuyu", "kv_heads": 4, "width": 56, "head_size": 14}, "make it a multiple of 4"),
    ],
)
def test_inconsistent_values_are_refused_with_a_remedy(wrong: dict, remedy: str) -> None:
    assert FuyuConfig(**VALID)
    with pytest.raises(UserError, match=remedy):
        FuyuConfig(**VALID | wrong)


@pytest.mark.parametrize("name", get_args(SizeName))
def test_named_sizes_have_about_the_parameters_they_are_named_for(name: SizeName) -> None:
    named = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    with torch.device("meta"):
        decoder = Decoder(named_size(name))
    parameters = sum(weight.numel() for weight in decoder.parameters())
    assert 0.8 < parameters / named < 1.2
    assert parameters == cost(decoder.config, document_lengths=(1,), grids=(), targets=0).parameters


def test_the_page_on_recipes_lists_each_named_size(repository: Path) -> None:
    rows = []
    for name in get_args(SizeName):
        size = named_size(name)
        parameters = cost(size, document_lengths=(1,), grids=(), targets=0).parameters
        shape = (size.layers, size.width, size.heads, size.kv_heads, size.head_size, size.feed_forward)
        numbers = (*shape, size.patch_size, size.vocab_size)
        rows.append(f"| `{name}` | {' | '.join(f'{number:,}' for number in numbers)} | {parameters / 1e6:,.1f}M |")
    assert "\n".join(rows) in (repository / "docs/recipes.md").read_text()


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"the sizes are 1m, .*8b"):
        named_size("7b")
