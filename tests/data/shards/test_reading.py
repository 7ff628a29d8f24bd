"""Shards are read whole or reported; webdataset's silent losses are not silent here."""

import gzip
import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import SAMPLE_BYTES, Shard, read_documents
from fuyu_e2e.errors import UnusableSampleError, UserError


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


TEN = [(f"{number}.txt", f"text {number}".encode()) for number in range(10)]


@pytest.mark.parametrize("content", [b"", b"\0" * 20_480, b"<html>not found</html>" * 100, b"\x1f\x8b" + b"x" * 600])
def test_a_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"bad\.tar is not a tar file"):
        Shard(write(tmp_path / "bad.tar", content))
    with pytest.raises(UserError, match=r"gone\.tar can't be read"):
        Shard(tmp_path / "gone.tar")


def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    plain, path = tar_bytes(TEN), tmp_path / "a b.tar"
    write(path, gzip.compress(plain))
    with pytest.raises(
        UserError, match=r"not a tar file but one that gzip compressed: unpack it with `gunzip < "
    ) as told:
        Shard(path)
    [command] = re.findall("`(.*)`", str(told.value))
    subprocess.run(command.replace("NEW.tar", "new.tar"), shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "new.tar").read_bytes() == plain
    with pytest.raises(UserError, match=r"let its command end in `\| gunzip`"):
        Shard(path, "pipe:cat x.tar.gz")


def test_members_group_by_the_name_before_the_first_dot(tmp_path: Path) -> None:
    members = [("d/1.JPG", b"a"), ("d/1.seg.png", b"b"), ("d/2.txt", b"c"), ("__meta__", b""), ("d.e/3.txt", b"d")]
    shard = Shard(write(tmp_path / "s.tar", tar_bytes(members)))
    samples = [shard.sample(number) for number in range(len(shard))]
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
        ([("1.tif", b"x"), ("1.txt", b"x")], "image-extension"),
    ],
)
def test_bad_members_cost_their_sample_and_are_counted(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    stats = SampleStats()
    shard = write(tmp_path / "s.tar", tar_bytes([("0.txt", b"before"), *members, ("9.txt", b"after")]))
    assert [document.answer for document in read_documents(shard, stats)] == ["before", "after"]
    assert stats.skipped == {reason: 1}
    assert stats.read == 3


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_no_image_and_its_caption_no_text(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, linked in (("0.txt", None), ("1.jpg", "0.txt"), ("1.txt", None)):
            member = tarfile.TarInfo(name)
            member.size = 0 if linked else 4
            if linked:
                member.type, member.linkname = kind, linked
            tar.addfile(member, None if linked else io.BytesIO(b"text"))
    stats = SampleStats()
    assert [document.key for document in read_documents(tmp_path / "s.tar", stats)] == ["0"]
    assert stats.skipped == {"member-link": 1}
    assert "1.jpg is a link to 0.txt" in stats.examples["member-link"]


@pytest.mark.parametrize("folders", [("", ""), ("images/", "captions/")])
def test_halves_of_a_sample_that_stand_apart_are_no_texts(tmp_path: Path, folders: tuple[str, str]) -> None:
    images = [(f"{folders[0]}{number}.jpg", b"x") for number in range(3)]
    texts = [(f"{folders[1]}{number}.txt", b"a caption") for number in range(3)]
    shard = write(tmp_path / "s.tar", tar_bytes([*images, ("meant.txt", b"a text"), *texts]))
    stats = SampleStats()
    assert [document.answer for document in read_documents(shard, stats)] == ["a text"]
    assert stats.skipped == {"members-apart": 6}
    assert "tar --sort=name" in stats.examples["members-apart"]


def test_hidden_files_are_passed_over_and_end_no_sample(tmp_path: Path) -> None:
    """What macOS and Finder leave beside files."""
    members = [
        ("./._0.jpg", b"mac"), ("./0.jpg", b"x"), ("./.DS_Store", b"mac"), ("./0.txt", b"a caption"),
        ("__MACOSX/._0.txt", b"mac"), ("./1.txt", b"a text"),
    ]  # fmt: skip
    shard = Shard(write(tmp_path / "s.tar", tar_bytes(members)))
    samples = [shard.sample(number) for number in range(len(shard))]
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [("./0", ["jpg", "txt"]), ("./1", ["txt"])]


@pytest.mark.parametrize("size", [1024, 10_240])
def test_an_archive_of_no_members_is_a_shard_of_no_documents(tmp_path: Path, size: int) -> None:
    stats = SampleStats()
    assert list(read_documents(write(tmp_path / "empty.tar", bytes(size)), stats)) == []
    assert stats == SampleStats()


def test_an_archive_behind_another_is_reported(tmp_path: Path) -> None:
    shard = write(tmp_path / "two.tar", tar_bytes(TEN[:2]) + tar_bytes(TEN[2:]))
    stats = SampleStats()
    assert len(list(read_documents(shard, stats))) == 2
    assert stats.skipped == {"shard-broken": 1}
    assert "goes on after the end of the archive" in stats.examples["shard-broken"]


def test_a_name_that_is_not_utf8_can_be_written_anywhere(tmp_path: Path) -> None:
    name = b"\xc4\xe3.txt".decode("utf-8", "surrogateescape")
    [document] = read_documents(write(tmp_path / "s.tar", tar_bytes([(name, b"a text")])), SampleStats())
    assert document.key == "\\xc4\\xe3"


@pytest.mark.parametrize(
    "cut_at", [512 * 9, 512 * 9 + 100, 512 * 10, 512 * 10 + 5], ids=["block", "header", "body", "in body"]
)
def test_a_shard_that_is_cut_is_reported(tmp_path: Path, cut_at: int) -> None:
    shard = write(tmp_path / "cut.tar", tar_bytes(TEN)[:cut_at])
    stats = SampleStats()
    documents = list(read_documents(shard, stats))
    assert 3 <= len(documents) <= 5
    assert stats.skipped == {"shard-broken": 1}
    assert stats.read == len(documents) + 1
    with pytest.raises(UnusableSampleError, match="sample-missing"):
        Shard(shard).sample(stats.read)
    assert "cut.tar" in stats.examples["shard-broken"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_says_nothing_of_a_cut_shard(tmp_path: Path) -> None:
    """Why the check above is ours."""
    shard = write(tmp_path / "cut.tar", tar_bytes(TEN)[: 512 * 8])
    assert len(list(webdataset.WebDataset(str(shard), shardshuffle=False))) == 4


def test_a_corrupt_header_is_reported(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(TEN))
    data[512 * 6 : 512 * 6 + 40] = b"\xff" * 40
    stats = SampleStats()
    documents = list(read_documents(write(tmp_path / "s.tar", bytes(data)), stats))
    assert len(documents) < 10
    assert stats.skipped["shard-broken"] == 1


@given(data=st.data())
def test_damaged_shards_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(tar_bytes(TEN))
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(TEN) * 1024))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    stats = SampleStats()
    try:
        used = len(list(read_documents(write(tmp_path / "s.tar", bytes(damaged)), stats)))
    except UserError as error:  # nothing of it is a tar
        assert "is not a tar file" in str(error)  # noqa: PT017
        return
    assert stats.read > 0
    assert stats.read == used + stats.skipped.total()


def test_documents_are_read_by_number_in_any_order(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n\n{"text": "b"}\n'
    members = [*TEN[:2], ("lines.jsonl", lines), ("deep/name" * 30 + ".txt", b"long name"), ("empty.jsonl", b"\n\n")]
    shard = Shard(write(tmp_path / "s.tar", tar_bytes(members)))
    stored = [shard.sample(number) for number in range(len(shard))]
    assert [sample.key[:12] for sample in stored] == ["0", "1", "lines/0", "lines/1", "deep/namedee", "empty/0"]
    for number in (5, 0, 3, 2, 4, 1):
        assert shard.sample(number) == stored[number]
    assert stored[3].members == {"jsonl": b'{"text": "b"}'}


def test_a_sample_too_large_for_memory_is_counted_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuyu_e2e.data.shards.reading.SAMPLE_BYTES", 4_000)
    assert SAMPLE_BYTES > 4_000
    members = [TEN[0], ("large.jsonl", b'{"text": "a"}\n' * 1_000), ("large2.txt", b"x" * 5_000), TEN[1]]
    stats = SampleStats()
    documents = list(read_documents(write(tmp_path / "s.tar", tar_bytes(members)), stats))
    assert [document.answer for document in documents] == ["text 0", "text 1"]
    assert stats.skipped == {"sample-too-many-bytes": 2}


def test_a_shard_that_changes_behind_our_back_costs_samples_that_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar", tar_bytes(TEN))
    shard = Shard(path)
    path.write_bytes(tar_bytes(TEN)[: 512 * 9])
    assert shard.sample(3).members == {"txt": b"text 3"}
    with pytest.raises(UnusableSampleError, match="sample-unreadable"):
        shard.sample(4)
