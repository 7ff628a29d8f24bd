"""A Lightning checkpoint, a sharded one and an exported folder load alike; nothing in any of them is ever run."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import EMAWeightAveraging

import fuyu_e2e
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.loading import StoredModel, build_decoder, load_model, read_model
from fuyu_e2e.checkpoint.metadata import ModelMetadata, Provenance
from fuyu_e2e.checkpoint.safetensors_io import read_weights, write_weights
from fuyu_e2e.checkpoint.sharded_files import GROUPS, REST, TABLE
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.tokenizer import Tokenizer, train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.folders import export_own
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImagePolicy
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.module import FuyuModule

ROUTED = RoutingConfig(share=(0.5, 0.25), blocks=(1, 3))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, config: FuyuConfig, tokenizer: Tokenizer, make_png: Callable
) -> Path:
    """A run of four steps with averaged weights; its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder / "tokenizer.model")
    for name, numbers in (("train.tar", range(8)), ("val.tar", range(8, 16))):
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                for extension, content in {"png": make_png(8 + number, 20), "txt": f"{number * 37}".encode()}.items():
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    data = FuyuDataModule(
        str(folder / "tokenizer.model"), 4, budget=128, lanes=2, shuffle=4, train=str(folder / "train.tar"),
        val=str(folder / "val.tar"), max_size=(64, 96),
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=[
            EMAWeightAveraging(decay=0.5),
            Checkpoints(folder / "checkpoints", filename="{step}", every_n_train_steps=4, save_top_k=0),
        ],
    )  # fmt: skip
    trainer.fit(FuyuModule(config), data)
    return folder


@pytest.fixture
def stored(config: FuyuConfig, decoder: Decoder, tokenizer: Tokenizer) -> StoredModel:
    metadata = ModelMetadata(config, tokenizer, ImagePolicy(patch_size=4, max_patches=99, max_size=(64, 96)))
    told = Provenance(step=7, tokens_seen=1234, data={"train": "ab" * 32}, validation={"val/loss": 1.25})
    return StoredModel(Path("nowhere"), metadata, dict(decoder.state_dict()), told)


def same_weights(decoder: Decoder, weights: dict[str, torch.Tensor]) -> bool:
    own = decoder.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


@pytest.mark.parametrize("routing", [None, ROUTED], ids=["dense", "routed"])
@pytest.mark.parametrize("dialect", ["qwen3", "fuyu"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_exported_is_what_is_loaded(
    routing: RoutingConfig | None, dialect: str, tied: bool, stored: StoredModel, tmp_path: Path
) -> None:
    heads = {"kv_heads": stored.metadata.config.heads} if dialect == "fuyu" else {}
    shape: dict[str, Any] = {"layers": 5, "dialect": dialect, "routing": routing, "tie_embeddings": tied} | heads
    config = replace(stored.metadata.config, **shape)
    decoder = Decoder(config)
    weights = {name: tensor for name, tensor in decoder.state_dict().items() if not (tied and name.startswith("lm_"))}
    metadata = replace(stored.metadata, config=config)
    export_own(replace(stored, metadata=metadata, weights=weights), tmp_path / "out")
    again = read_model(tmp_path / "out")
    assert again.provenance == stored.provenance
    assert again.metadata.config == config
    assert again.metadata.images == stored.metadata.images
    assert again.metadata.tokenizer.model == stored.metadata.tokenizer.model
    loaded = load_model(tmp_path / "out")
    assert loaded.step == 7
    assert same_weights(loaded.decoder, decoder.state_dict())
    assert not loaded.decoder.training
    if tied:
        assert loaded.decoder.lm_head.weight is loaded.decoder.embed_tokens.weight


def test_two_lines_give_a_model_and_a_processor(
    stored: StoredModel, decoder: Decoder, make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    export_own(stored, tmp_path / "out")
    model, processor = fuyu_e2e.load(tmp_path / "out")
    prompt = processor(make_png(9, 20), "What is it?")
    with torch.no_grad():
        assert torch.equal(model.logits(pack_row([prompt])), decoder.logits(pack_row([prompt])))
    [tokens] = fuyu_e2e.generate(model, [prompt], max_new_tokens=5, eos_id=processor.eos_id)
    assert isinstance(processor.decode(tokens), str)


def test_large_weights_lie_in_several_files(stored: StoredModel, tmp_path: Path) -> None:
    write_weights(stored.weights, tmp_path, shard_size=20_000)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert len(files) > 3
    assert "model.safetensors.index.json" in files
    again = read_weights(tmp_path)
    assert again.keys() == stored.weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.weights.items())


def test_the_card_tells_how_the_model_was_trained(stored: StoredModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 3\n")
    source = run / "checkpoints" / "last.ckpt"
    export_own(replace(stored, source=source), tmp_path / "out", "apache-2.0")
    text = (tmp_path / "out" / "README.md").read_text()
    for told in ("license: apache-2.0", "1,234", "ab" * 32, "val/loss | 1.25", "seed_everything: 3", "64 x 96"):
        assert told in text
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "seed_everything: 3\n"
    export_own(stored, tmp_path / "unlicensed")
    assert "license: other\nlicense_name: not-stated" in (tmp_path / "unlicensed" / "README.md").read_text()


def test_nothing_is_written_over(stored: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_own(stored, tmp_path / "out")
    with pytest.raises(UserError, match="already holds something"):
        export_own(stored, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing unfinished is left"


def test_an_export_that_fails_leaves_nothing(stored: StoredModel, tmp_path: Path) -> None:
    broken = replace(stored, weights=stored.weights | {"norm.weight": None})  # type: ignore[dict-item]
    with pytest.raises(Exception):  # noqa: B017, PT011
        export_own(broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def shard(checkpoint: dict[str, Any], folder: Path) -> Path:
    """Saves a checkpoint as Lightning's ModelParallelStrategy does: weights and optimizer apart from the rest."""
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    state = {"state_dict": checkpoint["state_dict"], "optimizer_0": checkpoint.get("optimizer_states", [{}])[0]}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / REST)
    return folder


def test_a_run_a_file_and_a_sharded_checkpoint_hold_the_same(run: Path, tmp_path: Path) -> None:
    file = next(run.glob("checkpoints/*.ckpt"))
    checkpoint = torch.load(file, weights_only=True)  # noqa: TID251
    from_run, from_file = read_model(run), read_model(file)
    assert from_run.source == from_file.source == file
    del checkpoint["current_model_state"], checkpoint["averaging_state"]
    whole = tmp_path / "whole.ckpt"
    torch.save(checkpoint, whole)
    sharded = shard(checkpoint, tmp_path / "sharded.ckpt")
    first, second = read_model(whole), read_model(sharded)
    assert first.provenance == second.provenance
    assert first.metadata.config == second.metadata.config
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in second.weights.items())
    whole.unlink()
    assert read_model(tmp_path).source == sharded, "a run's directory is searched for sharded ones too"


def test_a_checkpoint_tells_where_it_comes_from(run: Path) -> None:
    told = read_model(run).provenance
    assert told.step == 4
    assert told.tokens_seen > 100
    assert set(told.validation) == {"val/loss", "val/perplexity", "val/token_accuracy", "val/exact_match"}
    assert len(told.data["train"]) == 64
    assert read_model(run).metadata.images.max_size == (64, 96)


def test_averaged_weights_are_given_on_request(run: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(next(run.glob("checkpoints/*.ckpt")))
    name = "embed_tokens.weight"
    left, averaged = read_model(run), read_model(run, averaged=True)
    assert torch.equal(left.weights[name], checkpoint["current_model_state"][f"decoder.{name}"])
    assert torch.equal(averaged.weights[name], checkpoint["state_dict"][f"decoder.{name}"])
    assert not torch.equal(left.weights[name], averaged.weights[name])
    export_own(averaged, tmp_path / "averaged")
    assert read_model(tmp_path / "averaged", averaged=True).provenance.averaged
    export_own(left, tmp_path / "left")
    with pytest.raises(UserError, match="holds no averaged weights"):
        read_model(tmp_path / "left", averaged=True)
    plain = {key: value for key, value in checkpoint.items() if key not in ("current_model_state", "averaging_state")}
    torch.save(plain, tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match=r"plain.ckpt holds no averaged weights.*EMAWeightAveraging"):
        read_model(tmp_path / "plain.ckpt", averaged=True)


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("where", ["a file", "the table of a sharded one", "the rest of a sharded one", "a shard"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(where: str, run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True)  # noqa: TID251
    del checkpoint["current_model_state"], checkpoint["averaging_state"]
    evil = Evil(tmp_path / "it ran")
    path = shard(checkpoint, tmp_path / "sharded.ckpt")
    read_model(path)
    if where == "a file":
        path = tmp_path / "file.ckpt"
        torch.save(checkpoint | {"evil": evil}, path)
    elif where == "the table of a sharded one":
        (path / TABLE).write_bytes(pickle.dumps(evil))
    elif where == "the rest of a sharded one":
        torch.save({"evil": evil}, path / REST)
    else:
        shards = sorted(path.glob("*.distcp"))
        torch.save(evil, shards[0])
    with pytest.raises(UserError, match="can't be read as a"):
        read_model(path)
    assert not evil.place.exists()


def test_the_optimizer_of_a_sharded_checkpoint_is_tensors_or_nothing(run: Path, tmp_path: Path) -> None:
    """Lightning's own, with which objects are stored, torch would unpickle."""
    checkpoint = torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True)  # noqa: TID251
    evil = Evil(tmp_path / "it ran")
    checkpoint["optimizer_states"] = [{"state": {"evil": evil}}]
    path = shard(checkpoint, tmp_path / "sharded.ckpt")
    with pytest.raises(UserError, match=r"without running what it holds: start over .* --model.weights"):
        read_checkpoint(path, optimizer=True)
    rest = torch.load(path / REST, weights_only=True)  # noqa: TID251
    torch.save(rest | {GROUPS: []}, path / REST)
    assert read_checkpoint(path, optimizer=True)["optimizer_states"] == [{"state": {}, "param_groups": []}]
    assert not evil.place.exists()


def test_a_table_that_points_outside_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True)  # noqa: TID251
    path = shard(checkpoint, tmp_path / "sharded.ckpt")
    table = pickle.loads((path / TABLE).read_bytes())  # noqa: S301
    for entry in table.storage_data.values():
        entry.relative_path = f"../sharded.ckpt/{entry.relative_path}"
    (path / TABLE).write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match="names a file outside"):
        read_model(path)


def break_table(path: Path) -> None:
    (path / TABLE).write_bytes(b"junk")


def break_rest(path: Path) -> None:
    (path / REST).unlink()


def break_shards(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.unlink()


def break_cut(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("breaking", [break_table, break_rest, break_shards, break_cut])
def test_a_damaged_sharded_checkpoint_is_refused(breaking: Callable[[Path], None], run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True)  # noqa: TID251
    path = shard(checkpoint, tmp_path / "sharded.ckpt")
    breaking(path)
    with pytest.raises(UserError, match=r"sharded.ckpt (can't be read as a sharded|is no whole sharded) checkpoint"):
        read_model(path)


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def break_tokenizer(folder: Path) -> None:
    train_tokenizer(["another one"] * 9, 320).save(folder / "tokenizer.model")


def break_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.pt")


WRONG: dict[Callable[[Path], Any], str] = {
    lambda folder: (folder / "model.safetensors").unlink(): "model.safetensors is missing",
    break_pickled: "holds model.pt .* may hold code, so it is not opened",
    break_tokenizer: "tokenizer.model is not the tokenizer that",
    lambda folder: (folder / "tokenizer.model").unlink(): "tokenizer.model can't be read",
    lambda folder: edit(folder / "config.json", format="other"): "describes no model of fuyu-e2e",
    lambda folder: edit(folder / "config.json", format="x", model_type="fuyu"): "fuyu-e2e import --from",
    lambda folder: edit(
        folder / "config.json", format_version=2, version="9.9"
    ): "is of format 2.*install version 9.9",
    lambda folder: edit(folder / "config.json", decoder={"width": 3}): "whose settings version .* can't read",
    lambda folder: edit(folder / "config.json", provenance={"steps": 3}): "doesn't say how the model was trained",
    lambda folder: (folder / "config.json").write_text("[]"): "holds a list instead of an object",
    lambda folder: (folder / "model.safetensors").write_bytes(b"junk"): "is no safetensors file, or is damaged",
}


@pytest.mark.parametrize("breaking", WRONG, ids=list(map(str, range(len(WRONG)))))
def test_a_wrong_folder_is_refused_by_name(
    breaking: Callable[[Path], Any], stored: StoredModel, tmp_path: Path
) -> None:
    export_own(stored, tmp_path / "out")
    breaking(tmp_path / "out")
    with pytest.raises(UserError, match=WRONG[breaking]):
        read_model(tmp_path / "out")


def test_more_layers_than_tensors_are_refused_at_once(stored: StoredModel, tmp_path: Path) -> None:
    export_own(stored, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    edit(path, decoder=json.loads(path.read_text())["decoder"] | {"layers": 10**9})
    with pytest.raises(UserError, match="describes 1,000,000,000 layers, but holds"):
        read_model(tmp_path / "out")


def test_training_begins_with_given_weights(run: Path, question_data: Callable[..., FuyuDataModule]) -> None:
    stored = read_model(run)
    module = FuyuModule(stored.metadata.config, weights=str(run))
    data = question_data()
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    seen: dict[str, torch.Tensor] = {}

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update({name: tensor.clone() for name, tensor in module.decoder.state_dict().items()})
            assert module.decoder.training

    trainer.callbacks.append(Watch())
    trainer.fit(module, data)
    assert seen.keys() == stored.weights.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in stored.weights.items())
    other = FuyuModule(replace(stored.metadata.config, layers=2), weights=str(run))
    with pytest.raises(UserError, match="layers is 2 but 3 there"):
        pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            other, question_data()
        )


def test_the_decoder_computes_in_float32_whatever_is_stored(stored: StoredModel) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in stored.weights.items()}
    decoder = build_decoder(stored.metadata.config, halves)
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float32}
