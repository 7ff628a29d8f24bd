"""The benchmark of the data path runs, at a size that measures nothing, and its contenders read the same."""

import json
import os
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuyu_e2e.bench import data_peers
from fuyu_e2e.bench.data import (
    OURS,
    SIDES,
    Captioned,
    captioned_sequence,
    data,
    path_name,
    photographs,
)
from fuyu_e2e.bench.data_peers import decoders, pillow, readers
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import ImagePolicy, decode_image, image_size
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError

POLICY = ImagePolicy(patch_size=16)


@pytest.fixture(scope="module")
def samples() -> list[Captioned]:
    return list(islice(photographs(), 6))


@pytest.fixture
def shard(samples: list[Captioned], tmp_path: Path) -> Path:
    path = tmp_path / "own.tar"
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in (("jpg", sample.image), ("txt", sample.caption.encode())):
                (tmp_path / "member").write_bytes(content)
                tar.add(tmp_path / "member", f"{number}.{extension}")
    return path


def test_the_images_are_as_large_and_as_hard_as_photographs(samples: list[Captioned]) -> None:
    assert samples == list(islice(photographs(), 6)), "the same in each run"
    sizes = [image_size(sample.image, POLICY) for sample in samples]
    assert all(SIDES[0] <= max(size) <= SIDES[1] for size in sizes)
    assert len({width / height for width, height in sizes}) > 2
    bits = sum(8 * len(sample.image) for sample in samples) / sum(width * height for width, height in sizes)
    assert 1.2 < bits < 2.5
    assert all(len(sample.caption.split()) == 20 for sample in samples)


def test_the_benchmark_leaves_its_figures(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, cores = tmp_path / "data.json", os.sched_getaffinity(0)
    data(["--shards", str(shard), "--images", "3", "--rounds", "1", "--out", str(out)])
    assert os.sched_getaffinity(0) == cores
    written = json.loads(out.read_text())
    assert {"device", "threads", "torch", "date", "packages", "image_bytes"} <= set(written)
    assert (written["images"], written["made"], written["threads"]) == (3, False, 1)
    present = {line["name"] for line in written["results"][0]["decoders"] + written["results"][0]["paths"]}
    absent = {line["name"]: line["install"] for line in written["absent"]}
    assert {*data_peers.DECODERS} <= present | set(absent)
    assert {path_name(reader, False) for reader in data_peers.READERS if reader not in absent} <= present
    for result in written["results"]:
        for line in result["decoders"]:
            assert line["images_per_second"] > 0
            assert line["mean_difference"] < 2
        for line in result["paths"]:
            rounding = 0.5e-4 / line["seconds"] + 0.5 / line["tokens_per_second"]
            assert line["tokens_per_second"] == pytest.approx(result["tokens"] / line["seconds"], rel=2 * rounding)
            assert line["of_bare_decode"] > 0
        ours = result["paths"][0]
        assert (ours["name"], ours["ours_to_this"]) == (OURS, 1)
    assert [result["scaled_down"] > 0 for result in written["results"]] == [True, False]
    shown = capsys.readouterr().out
    assert [install for install in absent.values() if install not in shown] == []


def test_a_contender_that_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, samples: list[Captioned], tmp_path: Path
) -> None:
    def imported(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(data_peers, "_imported", imported)
    found, absent = decoders(samples[0].image)
    assert set(found) == {"Pillow", "Pillow with draft", "Pillow with draft + torch"}
    reading, absent_readers = readers([], tmp_path)
    assert set(reading) == {"webdataset"}
    assert {line.name for line in absent_readers} == {"Energon", "Mosaic Streaming"}
    assert [line for line in absent + absent_readers if " -m pip install " not in line.install] == []
    assert absent[-1].reason == "ModuleNotFoundError: No module named 'torchvision.io'"


def test_decoders_agree_with_pillow(samples: list[Captioned]) -> None:
    for name, decode in decoders(samples[0].image)[0].items():
        for sample in samples:
            size = image_size(sample.image, POLICY)
            assert (decode(sample.image, size) == pillow(sample.image, size)).all(), name


def test_readers_give_the_same_samples(samples: list[Captioned], shard: Path, tmp_path: Path) -> None:
    expected = [(str(number), sample.image, sample.caption) for number, sample in enumerate(samples)]
    for name, read in readers([shard], tmp_path)[0].items():
        assert list(read(False)) == expected, name
        assert list(read(False)) == expected, f"{name}, the second time"
        for (key, image, caption), sample in zip(read(True), samples, strict=True):
            assert caption == sample.caption, key
            assert (np.asarray(image) == pillow(sample.image, image.size)).all(), name


def test_a_decoded_image_makes_the_same_sequence(samples: list[Captioned], tokenizer: Tokenizer) -> None:
    builder = SequenceBuilder(tokenizer, POLICY)
    for sample in samples:
        made = captioned_sequence(builder, "key", decode_image(sample.image, POLICY), sample.caption)
        built = builder.build(Document("key", (Image(sample.image), Text(sample.caption))))
        assert made.tokens.tolist() == built.tokens.tolist()
        assert made.loss.tolist() == built.loss.tolist()
        assert (made.patches == built.patches).all()
        assert made.images == built.images


def test_shards_without_captioned_images_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        (tmp_path / "0.txt").write_text("only text")
        tar.add(tmp_path / "0.txt", "0.txt")
    with pytest.raises(UserError, match="no JPEG image with a caption"):
        data(["--shards", str(tmp_path / "text.tar"), "--out", str(tmp_path / "data.json")])
