"""Folders that transformers wrote become models of ours that compute the same; wrong ones are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuyu_e2e.checkpoint.loading import build_decoder
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.processor import Processor
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer, train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.folders import export_to_transformers
from fuyu_e2e.export.from_transformers import decoder_config, read_transformers
from fuyu_e2e.export.transformers import from_transformers, stock_inputs, to_transformers, transformers_config
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")

TEXT_MODELS: dict[str, dict[str, Any]] = {
    "persimmon": {"num_attention_heads": 4, "hidden_act": "relu2"},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
Write = Callable[..., Path]
WINDOW = AttentionMask(window=7)


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Write:
    """Makes a random model, and has transformers write it."""

    def write(text_model: str, tied: bool = False, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
        torch.manual_seed(len(text_model))
        text_model, _, windows = text_model.partition(", ")
        text = {
            "model_type": text_model,
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "tie_word_embeddings": tied,
        } | TEXT_MODELS[text_model]
        if windows:  # from the second block on
            text |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        config = transformers.FuyuConfig(
            text_config=text, patch_size=4, image_token_id=tokenizer.patch_id, tie_word_embeddings=tied
        )
        model = transformers.FuyuForCausalLM(config).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)
        folder = tmp_path / "stock"
        model.save_pretrained(folder, **saving)
        tokenizer.save(folder / "tokenizer.model")
        size = {"size": {"height": 64, "width": 96}}
        (folder / "preprocessor_config.json").write_text(json.dumps(size))
        return folder

    return write


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("text_model", [*TEXT_MODELS, "qwen3, windows"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_imported_model_computes_what_transformers_does(
    text_model: str, tied: bool, write: Write, make_png: Callable[..., bytes]
) -> None:
    folder = write(text_model, tied)
    stored = read_transformers(folder)
    assert stored.metadata.images.max_size == (64, 96)
    assert stored.metadata.images.max_patches == 16 * 24
    processor = Processor(SequenceBuilder(stored.metadata.tokenizer, stored.metadata.images))
    prompt = processor(make_png(13, 30), "What is it?")
    stock = transformers.FuyuForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = build_decoder(stored.metadata.config, stored.weights).logits(pack_row([prompt]))
        theirs = stock(**stock_inputs([prompt])).logits[0]
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("text_model", [*TEXT_MODELS, "qwen3, windows"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_the_weights_are_bitwise_the_same(
    text_model: str, tied: bool, dtype: torch.dtype, write: Write, tmp_path: Path
) -> None:
    folder = write(text_model, tied, dtype, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2, "it lies in several files"
    export_to_transformers(read_transformers(folder), tmp_path / "back")
    before = transformers.FuyuForCausalLM.from_pretrained(folder, dtype="auto")
    after = transformers.FuyuForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == dtype
        assert torch.equal(tensor, second[name]), name
    known, again = before.config.to_dict(), after.config.to_dict()
    for name in ("patch_size", "image_token_id", "tie_word_embeddings", "num_channels"):
        assert known[name] == again[name]
    differing = {name for name, value in known["text_config"].items() if again["text_config"].get(name) != value}
    assert differing <= {
        "max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "head_dim", "max_window_layers"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "masks"),
    [
        (5, (WINDOW,)),
        (5, (WINDOW, WINDOW, CAUSAL)),
        (8, (WINDOW, WINDOW, WINDOW, CAUSAL)),
        (3, (CAUSAL, CAUSAL, WINDOW)),
        (2, (CAUSAL,)),
    ],
)
def test_patterns_of_windows_come_back_as_they_went(
    layers: int, masks: tuple[AttentionMask, ...], config: FuyuConfig, tmp_path: Path
) -> None:
    asked = replace(config, layers=layers, masks=masks)
    written = transformers_config(asked, patch_id=3, bos_id=1, eos_id=2, dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert decoder_config(tmp_path) == asked


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"layer_types": ["sliding_attention", "chunked_attention"]},
            "layer_types with 'chunked_attention', but only",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False},
            "use_sliding_window False and sliding_window None",
        ),
        ({"sliding_window": 0}, "sliding_window 0, which is no window of at least 1"),
    ],
)
def test_blocks_that_see_what_no_mask_shows_are_refused(changed: dict[str, Any], said: str, write: Write) -> None:
    folder = write("qwen3, windows")
    edit(folder / "config.json", lambda settings: settings["text_config"].update(changed))
    with pytest.raises(UserError, match=said):
        read_transformers(folder)


def test_names_as_transformers_has_them_in_memory_are_read_too(write: Write) -> None:
    folder = write("persimmon")
    expected = read_transformers(folder).weights
    in_memory = transformers.FuyuForCausalLM.from_pretrained(folder).state_dict()
    assert "model.language_model.layers.0.self_attn.query_key_value.bias" in in_memory
    save_file(in_memory, folder / "model.safetensors")
    found = read_transformers(folder).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_released_fuyu_8b_fits_key_by_key_and_shape_by_shape(tmp_path: Path) -> None:
    """Its configuration as it lies on the Hub, flat, and its 582 tensors, on the meta device."""
    flat = {
        "architectures": ["FuyuForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "relu2",
        "hidden_size": 4096,
        "image_size": 300,
        "intermediate_size": 16384,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 16384,
        "model_type": "fuyu",
        "num_attention_heads": 64,
        "num_channels": 3,
        "num_hidden_layers": 36,
        "patch_size": 30,
        "qk_layernorm": True,
        "rope_scaling": None,
        "rope_theta": 25000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    config = decoder_config(tmp_path)
    assert (config.dialect, config.rope_theta, config.head_size, config.rotary_size) == ("fuyu", 25_000.0, 64, 32)
    hub = released_tensors()
    assert len(hub) == 582
    with torch.device("meta"):
        wanted = Decoder(config).state_dict()
        stock = transformers.FuyuForCausalLM(transformers.FuyuConfig.from_dict(flat)).state_dict()
    parameters = sum(tensor.numel() for tensor in wanted.values())
    assert parameters == sum(tensor.numel() for tensor in stock.values()) == 9_408_238_592
    for named in (hub, stock):
        ours = from_transformers(named, config)
        assert {name: tensor.shape for name, tensor in ours.items()} == {
            name: tensor.shape for name, tensor in wanted.items()
        }
    back = to_transformers(wanted, config)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in hub.items()
    }


def released_tensors() -> dict[str, torch.Tensor]:
    """Fuyu-8B's tensors by the names that the Hub has them under."""
    block = {
        "input_layernorm.weight": (4096,),
        "input_layernorm.bias": (4096,),
        "post_attention_layernorm.weight": (4096,),
        "post_attention_layernorm.bias": (4096,),
        "self_attn.query_key_value.weight": (12288, 4096),
        "self_attn.query_key_value.bias": (12288,),
        "self_attn.dense.weight": (4096, 4096),
        "self_attn.dense.bias": (4096,),
        "self_attn.q_layernorm.weight": (64,),
        "self_attn.q_layernorm.bias": (64,),
        "self_attn.k_layernorm.weight": (64,),
        "self_attn.k_layernorm.bias": (64,),
        "mlp.dense_h_to_4h.weight": (16384, 4096),
        "mlp.dense_h_to_4h.bias": (16384,),
        "mlp.dense_4h_to_h.weight": (4096, 16384),
        "mlp.dense_4h_to_h.bias": (4096,),
    }
    shapes = {
        "language_model.model.embed_tokens.weight": (262144, 4096),
        "language_model.model.final_layernorm.weight": (4096,),
        "language_model.model.final_layernorm.bias": (4096,),
        "language_model.lm_head.weight": (262144, 4096),
        "vision_embed_tokens.weight": (4096, 2700),
        "vision_embed_tokens.bias": (4096,),
        **{
            f"language_model.model.layers.{layer}.{name}": shape
            for layer in range(36)
            for name, shape in block.items()
        },
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def break_missing_file(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def break_missing_tensor(folder: Path) -> None:
    def forget(index: dict) -> None:
        del index["weight_map"]["vision_embed_tokens.bias"]

    edit(folder / "model.safetensors.index.json", forget)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")


def break_shape(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"vision_embed_tokens.weight": torch.zeros(48, 49)}))


def break_fused_shape(folder: Path) -> None:
    name = "language_model.model.layers.1.self_attn.query_key_value.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(143, 48)}))


def break_extra(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"language_model.model.layers.7.odd": torch.zeros(3)}))


def break_lacking(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("language_model.model.layers.1.mlp.dense_4h_to_h.weight"))


def break_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")


def break_cut_file(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def break_tokenizer(folder: Path) -> None:
    train_tokenizer(["another size"] * 9, 310).save(folder / "tokenizer.model")


def break_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def break_placeholder(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings.update(image_token_id=71011))


def break_model(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings.update(model_type="llava"))


def break_text_model(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings["text_config"].update(model_type="llama"))


def break_activation(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings["text_config"].update(hidden_act="gelu"))


def break_rope(folder: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    edit(folder / "config.json", lambda settings: settings["text_config"].update(rope_parameters=rope))


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_text_config(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings.update(text_config=-1))


def break_patch_size(folder: Path) -> None:
    edit(folder / "config.json", lambda settings: settings.update(patch_size=None))


def break_size(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 64}}')


def break_size_of_patches(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 97}}')


def break_outside(folder: Path) -> None:
    def point_out(index: dict) -> None:
        index["weight_map"]["vision_embed_tokens.bias"] = "../model.safetensors"

    edit(folder / "model.safetensors.index.json", point_out)


WRONG = {
    break_missing_file: r"model-0000\d-of-0000\d\.safetensors is missing",
    break_missing_tensor: "vision_embed_tokens.bias is in .*against model.safetensors.index.json",
    break_shape: r"patch_projection.weight has the shape \[48, 49\].*\[48, 48\]",
    break_fused_shape: "lacks blocks.1.attention.k_proj.weight",
    break_extra: "holds language_model.model.layers.7.odd",
    break_lacking: "lacks blocks.1.mlp.down_proj.weight",
    break_pickle: "holds pytorch_model.bin .* may hold code, so it is not opened",
    break_cut_file: r"model-00001-of-0000\d\.safetensors is no safetensors file, or is damaged",
    break_tokenizer: "tokenizer.model has 310 tokens, but .* says vocab_size 320",
    break_no_tokenizer: "has no tokenizer.model.*--tokenizer FILE",
    break_placeholder: "image_token_id 71011",
    break_model: "model_type 'llava'; only 'fuyu'",
    break_text_model: "model_type 'llama'; only 'qwen3' and 'persimmon'",
    break_activation: "hidden_act 'gelu'.*'relu2'",
    break_rope: "rope_type 'linear'",
    break_json: "config.json is no JSON",
    break_text_config: "config.json says text_config -1, which is no object",
    break_patch_size: "config.json says patch_size None, but it must be a whole number",
    break_size: r"preprocessor_config.json must say size .* but it is \{'longest_edge': 64\}",
    break_size_of_patches: r"preprocessor_config.json must say size .*multiples of the patch size 4.*97",
    break_outside: r"'../model.safetensors', which lies outside",
}


@pytest.mark.parametrize("breaking", WRONG, ids=lambda breaking: breaking.__name__.removeprefix("break_"))
def test_a_wrong_folder_is_refused_by_the_name_of_what_is_wrong(
    breaking: Callable[[Path], None], write: Write
) -> None:
    folder = write("persimmon", max_shard_size="40KB")
    read_transformers(folder)
    breaking(folder)
    with pytest.raises(UserError, match=WRONG[breaking]):
        read_transformers(folder)


def test_a_tokenizer_elsewhere_can_be_named(write: Write, tmp_path: Path) -> None:
    folder = write("qwen3")
    elsewhere = (folder / "tokenizer.model").rename(tmp_path / "t.model")
    assert read_transformers(folder, elsewhere).metadata.tokenizer.vocab_size == 320
