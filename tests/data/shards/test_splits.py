"""No run trains on a shard that it validates or is tested on, whatever the shard is called."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import index
from fuyu_e2e.data.shards.mixture import Source
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., FuyuDataModule]:
    """Makes a data module over `shards/`, which holds two shards to train on and one to validate on."""
    for name in ("train-00000", "train-00001", "val-00000"):
        write(tmp_path / "shards" / f"{name}.tar", name)
    tokenizer.save(tmp_path / "tokenizer.model")

    def make(**named: Any) -> FuyuDataModule:
        return FuyuDataModule(str(tmp_path / "tokenizer.model"), 4, cache_dir=str(tmp_path / "cache"), **named)

    return make


def test_a_folder_is_not_trained_on_with_its_validation_shards(data: Callable, tmp_path: Path) -> None:
    everything, val = f"{tmp_path}/shards/*.tar", f"{tmp_path}/shards/val-*.tar"
    with pytest.raises(UserError) as refused:
        data(train=everything, val=val).setup("fit")
    assert str(refused.value).startswith(f"data.train {everything!r} and data.val {val!r} both hold ")
    assert f"{tmp_path}/shards/val-00000.tar: name each shard in one of them only" in str(refused.value)
    data(train=f"{tmp_path}/shards/train-*.tar", val=val).setup("fit")


@pytest.mark.parametrize("copy", [shutil.copy, os.link, os.symlink])
def test_the_same_data_is_found_under_another_name_in_another_folder(
    data: Callable, tmp_path: Path, copy: Callable[[Path, Path], object]
) -> None:
    write(tmp_path / "other" / "a.tar", "something else")
    copy(tmp_path / "shards" / "train-00001.tar", tmp_path / "other" / "b.tar")
    with pytest.raises(UserError) as refused:
        data(train=f"{tmp_path}/shards/train-*.tar", val=[f"{tmp_path}/other"]).setup("fit")
    said = str(refused.value)
    assert f"data.val '{tmp_path}/other' hold the same data" in said
    assert f"in {tmp_path}/shards/train-00001.tar and in {tmp_path}/other/b.tar" in said


def test_each_source_of_a_mixture_counts(data: Callable, tmp_path: Path) -> None:
    write(tmp_path / "other" / "a.tar", "something else")
    mixture = {"own": Source(f"{tmp_path}/shards/*.tar"), "other": Source([f"{tmp_path}/other"])}
    with pytest.raises(UserError, match=rf"data\.mixture '.*', '{tmp_path}/other' and data\.val .* both hold"):
        data(mixture=mixture, val=f"{tmp_path}/shards/val-*.tar").setup("fit")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_test_shards_are_compared_with_what_a_manifest_knows(data: Callable, tmp_path: Path, stage: str) -> None:
    """Those of a split that the stage doesn't read may be elsewhere, or not be indexed yet."""
    named = {"train": f"{tmp_path}/shards/train-*.tar", "test": f"{tmp_path}/shards/train-00001.tar"}
    index([str(path) for path in tmp_path.glob("shards/*.tar")], ShardCache(tmp_path / "cache", 10**9))
    with pytest.raises(UserError, match=r"data\.(train|test) .* both hold .*train-00001\.tar"):
        data(**named).setup(stage)
    other = {"train": f"{tmp_path}/gone/*.tar", "test": f"{tmp_path}/gone/*.tar"}
    data(**{**named, **other, stage.replace("fit", "train"): named["train"]}).setup(stage)


def test_what_is_continued_may_be_what_was_trained_on(data: Callable, tmp_path: Path) -> None:
    everything = f"{tmp_path}/shards/*.tar"
    data(train=everything, predict=everything).setup("predict")


def test_what_is_wrong_is_said_where_all_processes_hear_it(data: Callable, tmp_path: Path) -> None:
    """`prepare_data` runs in one of them: the others would end with a traceback of a connection that is closed."""
    overlapping = data(train=f"{tmp_path}/shards", val=f"{tmp_path}/shards")
    overlapping.trainer = SimpleNamespace(state=SimpleNamespace(fn=SimpleNamespace(value="fit")))
    overlapping.prepare_data()
    with pytest.raises(UserError, match="both hold"):
        overlapping.setup("fit")
