"""Exported folders in stock transformers: the same ids, patches, logits and tokens, from raw files and texts on."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file

from fuyu_e2e.checkpoint.metadata import ModelMetadata
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.processor import Processor
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.tokenizer_json import fast_tokenizer
from fuyu_e2e.export.transformers import (
    from_transformers,
    largest_size,
    scales_alike,
    stock_inputs,
    to_transformers,
    transformers_config,
    write_transformers,
)
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.blocks.dense import DenseConfig
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImagePolicy
from fuyu_e2e.model.routing.config import RoutingConfig

from .conftest import SHAPES

transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")

OLDEST = "5.16.1"
NEW_TOKENS = 64
NO_END = -1
"""An end of document that never comes, so that all tokens are compared."""
CASES = [(shape, tied, seed) for shape in SHAPES for tied in (False, True) for seed in range(3)]
TEXTS = ["Read the digits.", "", "4072  a\n", "é ▁ 日"]
"""The empty one is what a caption is asked for with."""
ALONE = ["a red square", "", " 19 8 3 ", "\u2581\t\x00é"]


def name_of(shape: str, tied: bool, seed: int) -> str:
    return f"{shape}{', tied' if tied else ''}, seed {seed}"


@pytest.fixture(scope="module")
def decoders(trained_decoder: Callable[..., Decoder]) -> dict[str, Decoder]:
    return {
        name_of(shape, tied, seed): trained_decoder(seed, **SHAPES[shape], tie_embeddings=tied)
        for shape, tied, seed in CASES
    }


@pytest.fixture(scope="module")
def exported(
    decoders: dict[str, Decoder],
    tokenizer: Tokenizer,
    fitted_images: ImagePolicy,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A folder for each decoder, with images in three formats, one of which has to be scaled, and texts."""
    folders = {}
    for number, (name, decoder) in enumerate(decoders.items()):
        folder = folders[name] = tmp_path_factory.mktemp("exported")
        write_transformers(ModelMetadata(decoder.config, tokenizer, fitted_images), decoder.state_dict(), folder)
        rng = np.random.default_rng(number)
        files = {"a.png": (20, 31), "b.jpg": (40, 17), "c.webp": (9, 50), "large.png": (75, 150)}
        for file, (height, width) in files.items():
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Pillow.fromarray(pixels).save(folder / file, lossless=True)
        asked = {"images": list(files), "texts": TEXTS, "alone": ALONE, "new_tokens": NEW_TOKENS}
        (folder / "asked.json").write_text(json.dumps(asked))
    return folders


@pytest.fixture(scope="module")
def answered(exported: dict[str, Path], run_stock: Callable[..., str]) -> dict[str, dict[str, torch.Tensor]]:
    run_stock(list(exported.values()))
    return {name: load_file(folder / "answered.safetensors") for name, folder in exported.items()}


def compare(decoder: Decoder, builder: SequenceBuilder, folder: Path, stock: dict[str, torch.Tensor]) -> None:
    """Compares what stock software made of a folder's questions with what we make of them."""
    asked = json.loads((folder / "asked.json").read_text())
    processor = Processor(builder)
    prompts = [processor(folder / image, text) for image, text in zip(asked["images"], asked["texts"], strict=True)]
    ours = stock_inputs(prompts)
    assert torch.equal(ours["input_ids"], stock["input_ids"])
    assert torch.equal(ours["attention_mask"], stock["attention_mask"])
    torch.testing.assert_close(ours["pixel_values"], stock["patches"], atol=1e-6, rtol=0)
    for number, text in enumerate(asked["alone"]):
        assert builder.tokenizer.encode(text) == stock[f"alone.{number}"].tolist()
    assert stock["begin"].tolist() == [builder.tokenizer.bos_id]
    with torch.no_grad():
        logits = decoder.logits(pack_row(prompts)).split([len(prompt) for prompt in prompts])
    for own, theirs in zip(logits, stock["logits"], strict=True):
        assert own.std() > 0.5, "the model says nothing, so the comparison means nothing"
        torch.testing.assert_close(own, theirs[-len(own) :], atol=1e-4, rtol=0)
    assert generate(decoder, prompts, max_new_tokens=NEW_TOKENS, eos_id=NO_END) == stock["written"].tolist()


@pytest.mark.parametrize(("shape", "tied", "seed"), CASES)
def test_stock_software_computes_what_we_do(
    shape: str,
    tied: bool,
    seed: int,
    decoders: dict[str, Decoder],
    exported: dict[str, Path],
    answered: dict[str, dict[str, torch.Tensor]],
    tokenizer: Tokenizer,
    fitted_images: ImagePolicy,
) -> None:
    name = name_of(shape, tied, seed)
    compare(decoders[name], SequenceBuilder(tokenizer, fitted_images), exported[name], answered[name])


def test_so_does_the_oldest_version_that_is_supported(
    decoders: dict[str, Decoder],
    exported: dict[str, Path],
    run_stock: Callable[..., str],
    tokenizer: Tokenizer,
    fitted_images: ImagePolicy,
) -> None:
    names = [name_of(shape, number % 2 == 0, 0) for number, shape in enumerate(SHAPES)]
    run_stock([exported[name] for name in names], OLDEST)
    for name in names:
        stock = load_file(exported[name] / "answered.safetensors")
        compare(decoders[name], SequenceBuilder(tokenizer, fitted_images), exported[name], stock)


@pytest.mark.parametrize("shape", SHAPES)
def test_several_interleaved_images_go_in_as_ids_and_patches(
    shape: str, exported: dict[str, Path], decoders: dict[str, Decoder], builder: SequenceBuilder
) -> None:
    name = name_of(shape, False, 0)
    stock = transformers.FuyuForCausalLM.from_pretrained(exported[name]).eval()
    processor = Processor(builder)
    image, other = ((exported[name] / file).read_bytes() for file in ("a.png", "c.webp"))
    prompts = [processor("First", image, "then", other, "?"), processor("no image"), processor(other, image, "a")]
    inputs = stock_inputs(prompts)
    with torch.no_grad():
        written = stock.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    ours = generate(decoders[name], prompts, max_new_tokens=16, eos_id=NO_END)
    assert written[:, inputs["input_ids"].shape[1] :].tolist() == ours


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_go_over_and_back_bit_for_bit_from_either_way_of_naming_them(
    shape: str, decoders: dict[str, Decoder], exported: dict[str, Path]
) -> None:
    name = name_of(shape, False, 1)
    decoder = decoders[name]
    weights = {key: tensor.bfloat16() for key, tensor in decoder.state_dict().items()}
    there = to_transformers(weights, decoder.config)
    in_memory = transformers.FuyuForCausalLM.from_pretrained(exported[name]).state_dict()
    back = from_transformers(there, decoder.config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) and back[key].dtype == torch.bfloat16 for key in weights)
    frequencies = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    again = from_transformers(in_memory | frequencies, decoder.config)
    assert all(torch.equal(again[key], tensor) for key, tensor in decoder.state_dict().items())
    assert again.keys() == weights.keys()


def test_the_lines_in_the_page_on_export_run(
    exported: dict[str, Path],
    decoders: dict[str, Decoder],
    run_stock: Callable[..., str],
    repository: Path,
    tokenizer: Tokenizer,
    fitted_images: ImagePolicy,
    tmp_path: Path,
) -> None:
    name = name_of("qwen3, grouped", False, 0)
    page = (repository / "docs/export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [lines] = [block for block in blocks if "AutoProcessor" in block]
    image = exported[name] / "a.png"
    script = tmp_path / "lines.py"
    script.write_text(lines.replace("runs/quickstart/fuyu-digits", str(exported[name])).replace("a.png", str(image)))
    printed = run_stock([script])
    prompt = Processor(SequenceBuilder(tokenizer, fitted_images))(image, "Read the digits.")
    [written] = generate(decoders[name], [prompt], max_new_tokens=16, eos_id=tokenizer.eos_id)
    fast = fast_tokenizer(tokenizer)
    assert printed.strip().splitlines()[-1] == repr([fast.decode([*prompt.tokens.tolist(), *written])])


def test_a_routed_decoder_is_not_exported_as_a_dense_one(
    trained_decoder: Callable[..., Decoder], tokenizer: Tokenizer, fitted_images: ImagePolicy, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_size": 16, "layers": 4}
    decoder = trained_decoder(0, **shape, routing=RoutingConfig(share=0.5))
    for export in (
        lambda: transformers_config(decoder.config, patch_id=3, bos_id=1, eos_id=2, dtype=torch.float32),
        lambda: to_transformers(decoder.state_dict(), decoder.config),
        lambda: write_transformers(
            ModelMetadata(decoder.config, tokenizer, fitted_images), decoder.state_dict(), tmp_path
        ),
    ):
        with pytest.raises(UserError, match=r"routed blocks can't be exported .*--to fuyu-e2e"):
            export()
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, kw_only=True)
class OwnMask(AttentionMask):
    """A user's own."""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        return super().sees(query, key, same_image) & (query - key != 1)


@dataclass(frozen=True)
class OwnBlocks(DenseConfig):
    """A user's own."""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": (AttentionMask(window=9, sinks=2),)}, r"decoder\.masks that hold 2 sinks .* model has 0"),
        (
            {"masks": (CAUSAL, AttentionMask(images="bidirectional"))},
            r"masks that hold images 'bidirectional' .*'causal'",
        ),
        ({"masks": (OwnMask(window=9),)}, r"masks that hold a OwnMask .* windows of AttentionMask alone"),
        (
            {"masks": (AttentionMask(window=1_000), AttentionMask(window=9))},
            r"masks that hold windows of 9 and 1,000 ",
        ),
        ({"masks": (AttentionMask(window=9),), "dialect": "fuyu"}, r"a window of 9 in the dialect 'fuyu' .*'qwen3'"),
        ({"blocks": (DenseConfig(), OwnBlocks())}, r"decoder\.blocks of the kind OwnBlocks .*\(DenseConfig\)"),
    ],
)
def test_masks_and_blocks_that_no_text_model_has_are_refused(
    config: FuyuConfig, settings: dict[str, Any], said: str
) -> None:
    asked = replace(config, width=48, heads=4, kv_heads=4, head_size=12, **settings)
    with pytest.raises(UserError, match=f"{said}.*--to fuyu-e2e"):
        transformers_config(asked, patch_id=3, bos_id=1, eos_id=2, dtype=torch.float32)


def test_what_only_unused_places_of_a_pattern_hold_is_exported(config: FuyuConfig) -> None:
    """Three blocks have no mask of a pattern's fourth place."""
    masks = (AttentionMask(window=9), CAUSAL, CAUSAL, AttentionMask(window=5, sinks=1))
    text = transformers_config(replace(config, masks=masks), patch_id=3, bos_id=1, eos_id=2, dtype=torch.float32)[
        "text_config"
    ]
    assert text["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert (text["use_sliding_window"], text["sliding_window"]) == (True, 9)


def test_where_sizes_agree_and_where_they_do_not_is_known() -> None:
    assert scales_alike(ImagePolicy(patch_size=8, max_patches=8, max_size=(16, 32)))
    assert not scales_alike(ImagePolicy(patch_size=8, max_patches=7, max_size=(16, 32)))
    assert not scales_alike(ImagePolicy(patch_size=8, max_patches=100))
    assert largest_size(ImagePolicy(patch_size=8, max_patches=99)) == (72, 72)
    assert largest_size(ImagePolicy(patch_size=8, max_patches=99, max_size=(16, 32))) == (16, 32)
