"""What shards hold is counted once, and what is not as counted is said in a sentence."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image as Pillow

from fuyu_e2e.cli import main
from fuyu_e2e.cli.shards import shards as run_shards
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import NAME, VERSION, check_complete, facts_of, index, verify
from fuyu_e2e.errors import FAULTY, UserError

Png = Callable[..., bytes]


def write(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9)


@pytest.fixture
def shards(tmp_path: Path, make_png: Png) -> list[str]:
    folder = tmp_path / "shards"
    folder.mkdir()
    chat = json.dumps({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}).encode()
    segments = json.dumps({"segments": [{"image": "a.png"}, {"text": "x"}, {"image": "a.png"}]}).encode()
    return [
        write(folder / "train-0.tar", {"0.png": make_png(20, 40), "0.txt": b"a caption", "1.txt": b"text"}),
        write(folder / "train-1.tar", {"0.png": make_png(9, 9), "0.json": chat, "1.png": b"no image", "1.txt": b"x"}),
        write(
            folder / "val-0.tar", {"0.a.png": make_png(9, 9), "0.json": segments, "1.jsonl": b'{"text": "a"}\n' * 3}
        ),
    ]


def test_a_manifest_counts_documents_kinds_images_and_tokens(shards: list[str], cache: ShardCache) -> None:
    facts, [place] = index(shards, cache)
    assert [facts[shard].documents for shard in shards] == [2, 2, 4]
    assert [facts[shard].kinds for shard in shards] == [
        {"caption": 1, "text": 1},
        {"chat": 1},
        {"interleaved": 1, "text": 3},
    ]
    assert [facts[shard].images for shard in shards] == [1, 1, 2]
    # Two rows of three patches and a newline, nine letters at four a token; one token for "text".
    assert facts[shards[0]].tokens_estimate == 2 * (3 + 1) + 3 + 1
    assert facts[shards[1]].unusable == {"image-unreadable": 1}
    described = json.loads(Path(place).read_text())
    assert described["totals"]["documents"] == 8
    assert described["totals"]["kinds"] == {"caption": 1, "text": 4, "chat": 1, "interleaved": 1}
    assert described["tokens_estimated_for"]["patch_size"] == 16
    assert facts_of(shards, cache) == tuple(facts.values())


def test_a_first_run_indexes_what_no_manifest_knows_and_later_ones_read_it(
    shards: list[str], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = facts_of(shards[:2], cache)
    assert set(json.loads((Path(shards[0]).parent / NAME).read_text())["shards"]) == {"train-0.tar", "train-1.tar"}
    facts_of(shards[2:], cache)
    monkeypatch.setattr("fuyu_e2e.data.shards.manifest.index", None)
    assert facts_of(shards, cache)[:2] == first


def test_a_folder_that_cannot_be_written_has_its_manifest_in_the_cache(
    shards: list[str], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, no folder is read-only, so writing is made to fail."""
    monkeypatch.setattr("fuyu_e2e.data.shards.manifest._beside", lambda folder: "/proc/no/such/folder")
    _, [place] = index(shards, cache)
    assert Path(place).is_relative_to(cache.folder)
    monkeypatch.setattr("fuyu_e2e.data.shards.manifest.index", None)
    assert [facts.documents for facts in facts_of(shards, cache)] == [2, 2, 4]


def test_a_shard_of_another_size_is_refused_before_the_run(shards: list[str], cache: ShardCache) -> None:
    index(shards, cache)
    data = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(data[:1024])
    with pytest.raises(UserError, match=r"train-1\.tar has 1,024 bytes, but its manifest says 10,240"):
        facts_of(shards, cache)


def test_a_shard_that_is_gone_is_noticed_among_its_like(shards: list[str], cache: ShardCache) -> None:
    index(shards, cache)
    Path(shards[1]).unlink()
    check_complete(shards[2:], cache)
    with pytest.raises(UserError, match=r"train-1\.tar is listed in .*fuyu-manifest\.json but is gone"):
        check_complete(shards[:1], cache)
    index(shards[:1], cache)
    check_complete(shards[:1], cache)


def test_remote_shards_without_a_manifest_name_the_command(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuyu_e2e.data.shards.manifest.read_bytes", lambda place: None)
    with pytest.raises(UserError, match=r"No manifest knows https://host/a\.tar and 1 others.*shards index"):
        facts_of(["https://host/a.tar", "https://host/b.tar"], cache)


def test_a_manifest_that_counted_by_earlier_rules_is_made_again(
    shards: list[str], cache: ShardCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, [place] = index(shards, cache)
    earlier = json.loads(Path(place).read_text()) | {"version": VERSION - 1}
    for counted in earlier["shards"].values():
        counted["documents"] = 99
    Path(place).write_text(json.dumps(earlier))
    assert facts_of(shards[:1], cache) == (facts[shards[0]],)
    assert "earlier version of fuyu-e2e" in caplog.text
    assert json.loads(Path(place).read_text())["version"] == VERSION
    monkeypatch.setattr("fuyu_e2e.data.shards.manifest.read_bytes", lambda place: json.dumps(earlier).encode())
    with pytest.raises(UserError, match=r"https://host/fuyu-manifest\.json is of an earlier version.*shards index"):
        facts_of(["https://host/train-0.tar"], cache)


def test_verify_says_which_manifest_is_of_earlier_rules_and_how_shards_are_counted_again(
    shards: list[str], cache: ShardCache
) -> None:
    _, [place] = index(shards, cache)
    described = json.loads(Path(place).read_text())
    Path(place).write_text(json.dumps(described | {"version": VERSION - 1}))
    said = f"is only in {place}, which is of an earlier version of fuyu-e2e, which took other samples for documents"
    assert [fault.reason for fault in verify(shards, shards, cache)] == [
        f"{said}: `fuyu-e2e shards index` counts it again"
    ] * 3
    described["shards"]["train-1.tar"]["unusable"] = {"format-unknown": 1}
    described["shards"]["val-0.tar"]["documents"] = 5
    Path(place).write_text(json.dumps(described))
    first, last, other = verify(shards, shards, cache)
    assert (first.reason, last.reason, other.reason) == (
        "has 0 unusable documents (format-unknown) instead of 1",
        "has 1 unusable documents (image-unreadable) instead of 0: `fuyu-e2e shards index` counts them again",
        "has 4 documents instead of 5: `fuyu-e2e shards index` counts them again",
    )


def test_a_file_that_is_no_manifest_is_named(shards: list[str], cache: ShardCache) -> None:
    place = Path(shards[0]).parent / NAME
    strange = {"version": VERSION, "shards": {"a.tar": {"x": 1}}}
    for content in ("[]", "{", '{"version": 99, "shards": {}}', json.dumps(strange)):
        place.write_text(content)
        with pytest.raises(UserError, match=r"fuyu-manifest\.json is no manifest of this version"):
            facts_of(shards, cache)


def test_verify_says_what_is_cut_changed_gone_or_unknown(shards: list[str], cache: ShardCache) -> None:
    folder = Path(shards[0]).parent
    index(shards, cache)
    assert verify([str(folder)], shards, cache) == []
    data = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(data[:1536])
    Path(shards[1]).unlink()
    flipped = bytearray(Path(shards[2]).read_bytes())
    flipped[600] ^= 1
    Path(shards[2]).write_bytes(flipped)
    write(folder / "train-9.tar", {"0.txt": b"new"})
    found = [str(folder / name) for name in ("train-0.tar", "train-9.tar", "val-0.tar")]
    said = {f"{Path(fault.shard).name} {fault.reason}" for fault in verify([str(folder)], found, cache)}
    assert said == {
        "train-0.tar has 1,536 bytes instead of 10,240",
        "train-0.tar has 1 documents instead of 2",
        "train-0.tar has 1 unusable documents (shard-broken) instead of 0",
        "train-1.tar is gone",
        "train-9.tar is in no manifest",
        "val-0.tar has another checksum",
    }
    assert [fault.reason for fault in verify([f"{folder}/val-*.tar"], found[2:], cache)] == ["has another checksum"]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_only_a_deep_look_finds_images_that_break_off(
    tmp_path: Path, make_png: Png, cache: ShardCache, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    with Pillow.open(io.BytesIO(make_png(90, 200))) as noise:
        noise.save(file, form)
    image, extension = file.getvalue(), {"PNG": "png", "JPEG": "jpg"}[form]
    members = {f"whole.{extension}": image, "whole.txt": b"x", f"cut.{extension}": image[: len(image) // 2]}
    members |= {"cut.txt": b"x", f"none.{extension}": b"no image", "none.txt": b"x"}
    shard = write(tmp_path / "a.tar", members)
    facts, _ = index([shard], cache)
    assert facts[shard].unusable == {"image-unreadable": 1}
    assert verify([shard], [shard], cache) == []
    [fault] = verify([shard], [shard], cache, deep=True)
    assert fault.shard == shard
    assert fault.reason.startswith("has an image that can't be decoded in sample cut (image-unreadable: ")
    assert run_shards(["verify", shard, "--deep", "--processes", "1", "--cache-dir", str(cache.folder)]) == FAULTY
    assert "compared with their manifests and decoded: 1 faults" in capsys.readouterr().out


def test_the_commands_print_what_they_find(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shards[0]).parent
    common = [str(folder), "--processes", "1", "--cache-dir", str(tmp_path / "cache")]

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fuyu-e2e", "shards", *args])
        code = main()
        output = capsys.readouterr()
        return code, output.out + output.err

    code, said = run("index", *common)
    assert code == 0
    assert "caption 1, chat 1, interleaved 1, text 4" in said
    assert "unusable: image-unreadable 1" in said
    assert "skipped first: image-unreadable: " in said
    assert str(folder / NAME) in said
    assert "judged by their headers, not decoded" in said
    code, said = run("verify", *common)
    assert code == 0
    assert said.startswith("3 shards in 1 folders compared with their manifests: 0 faults\n")
    assert "--deep" in said
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[:-512])
    code, said = run("verify", *common)
    assert code == 1
    assert f"{shards[0]} has 9,728 bytes instead of 10,240" in said
    code, said = run("stats", *common, "--out", str(tmp_path / "stats.png"))
    assert code == 0
    assert "skipped first: image-unreadable: " in said
    assert "judged by their headers, not decoded" in said
    assert (tmp_path / "stats.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said = run("stats", *common, "--out", str(tmp_path / "none.png"))
    assert code == 0, "the figures need no matplotlib"
    assert "image width, pixels" in said
    assert "No picture was drawn. Drawing the distributions needs matplotlib: install it with pip" in said
    assert not (tmp_path / "none.png").exists()
    monkeypatch.undo()
    code, said = run("stats", *common, "--out", str(tmp_path))
    assert code == 2
    assert f"{tmp_path} can't be written (Is a directory)" in said
    code, said = run("index", str(folder), "--processes", "0")
    assert code == 2
    assert "--processes is 0" in said
    assert run()[0] == 2
    assert run("nonsense")[0] == 2
    assert run("--help")[0] == 0
