"""Shards are read whole or reported; webdataset's silent losses are not silent here."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.errors import UserError
from fuyu_e2e.shards.formats import read_documents
from fuyu_e2e.shards.reading import check_shards, expand_patterns, read_samples
from fuyu_e2e.tally import Tally


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


TEN = [(f"{number}.txt", f"text {number}".encode()) for number in range(10)]


def test_patterns_name_files_globs_braces_and_folders(tmp_path: Path) -> None:
    for name in ("a-0", "a-1", "a-2", "b-0"):
        write(tmp_path / f"{name}.tar", tar_bytes(TEN))
    (tmp_path / "notes.md").write_text("no shard")
    everything = tuple(str(tmp_path / f"{name}.tar") for name in ("a-0", "a-1", "a-2", "b-0"))
    assert expand_patterns(str(tmp_path)) == everything
    assert expand_patterns(f"{tmp_path}/*.tar") == everything
    assert expand_patterns(f"{tmp_path}/a-{{0..2}}.tar") == everything[:3]
    assert expand_patterns([f"{tmp_path}/b-0.tar", f"{tmp_path}/*.tar"]) == (everything[3], *everything[:3])


@pytest.mark.parametrize("url", ["pipe:touch HIT", "http://host/a.tar", "s3://bucket/a.tar", "file:///a.tar"])
def test_urls_are_refused_and_nothing_runs(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="only local shards"):
        expand_patterns(url)
    assert not (tmp_path / "HIT").exists()


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing-\*\.tar.*matches no shard: quote the pattern"):
        expand_patterns([f"{tmp_path}", f"{tmp_path}/nothing-*.tar"][1])


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"<html>not found</html>" * 100, b"\x1f\x8b" + b"x" * 600])
def test_a_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    good, bad = write(tmp_path / "good.tar", tar_bytes(TEN)), write(tmp_path / "bad.tar", content)
    check_shards([good])
    with pytest.raises(UserError, match=r"bad\.tar is not a tar file"):
        check_shards([good, bad])
    with pytest.raises(UserError, match=r"gone\.tar can't be read"):
        check_shards([str(tmp_path / "gone.tar")])


def test_members_group_by_the_name_before_the_first_dot(tmp_path: Path) -> None:
    members = [("d/1.JPG", b"a"), ("d/1.seg.png", b"b"), ("d/2.txt", b"c"), ("__meta__", b""), ("d.e/3.txt", b"d")]
    tally = Tally()
    samples = list(read_samples(write(tmp_path / "s.tar", tar_bytes(members)), tally))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("d/1", ["jpg", "seg.png"]),
        ("d/2", ["txt"]),
        ("d.e/3", ["txt"]),
    ]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../evil.txt", b"x")], "member-path"),
        ([("/etc/evil.txt", b"x")], "member-path"),
        ([("a/../../evil.txt", b"x")], "member-path"),
        ([("1.txt", b"x"), ("1.txt", b"y")], "member-duplicate"),
        ([("1.jpg", b"x"), ("1.txt", b"x"), ("1.JPG", b"y")], "member-duplicate"),
        ([("README", b"x")], "member-name"),
    ],
)
def test_bad_members_cost_their_sample_and_are_counted(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    tally = Tally()
    shard = write(tmp_path / "s.tar", tar_bytes([("0.txt", b"before"), *members, ("9.txt", b"behind")]))
    assert [document.answer for document in read_documents(shard, tally)] == ["before", "behind"]
    assert tally.skipped == {reason: 1}
    assert tally.read == 3


@pytest.mark.parametrize(
    "cut_at", [512 * 9, 512 * 9 + 100, 512 * 10, 512 * 10 + 5], ids=["block", "header", "body", "in body"]
)
def test_a_shard_that_is_cut_is_reported(tmp_path: Path, cut_at: int) -> None:
    shard = write(tmp_path / "cut.tar", tar_bytes(TEN)[:cut_at])
    tally = Tally()
    documents = list(read_documents(shard, tally))
    assert 3 <= len(documents) <= 5
    assert tally.skipped == {"shard-broken": 1}
    assert "cut.tar" in tally.examples["shard-broken"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_says_nothing_of_a_cut_shard(tmp_path: Path) -> None:
    """Why the check above is ours."""
    shard = write(tmp_path / "cut.tar", tar_bytes(TEN)[: 512 * 8])
    assert len(list(webdataset.WebDataset(shard, shardshuffle=False))) == 4


def test_a_corrupt_header_is_reported(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(TEN))
    data[512 * 6 : 512 * 6 + 40] = b"\xff" * 40
    tally = Tally()
    documents = list(read_documents(write(tmp_path / "s.tar", bytes(data)), tally))
    assert len(documents) < 10
    assert tally.skipped["shard-broken"] == 1


@given(data=st.data())
def test_damaged_shards_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(tar_bytes(TEN))
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(TEN) * 1024))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    tally = Tally()
    used = len(list(read_documents(write(tmp_path / "s.tar", bytes(damaged)), tally)))
    broken = tally.skipped.pop("shard-broken", 0)
    assert tally.read == used + tally.skipped.total()
    assert used + broken + tally.skipped.total() > 0
