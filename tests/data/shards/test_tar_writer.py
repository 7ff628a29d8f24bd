"""What we write and how we split names is what webdataset does, which takes seconds to import."""

from pathlib import Path

import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from fuyu_e2e.data.shards.reading import _split
from fuyu_e2e.data.shards.tar_writer import write_samples

NAMES = st.text("ab._/ é0", min_size=1, max_size=12)
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "txt", "0.png", "seg.json"]), st.binary(max_size=1500), min_size=1)


@given(samples=st.lists(st.tuples(st.text("abé0/", min_size=1, max_size=90), MEMBERS), max_size=4))
def test_a_shard_has_the_bytes_that_webdataset_writes(
    tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]]
) -> None:
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    with ours.open("wb") as file:
        write_samples(file, samples)
    with webdataset.TarWriter(str(theirs), encoder=False, mtime=0, user="", group="") as reference:
        for key, members in samples:
            reference.write({"__key__": key, **members})
    assert ours.read_bytes() == theirs.read_bytes()


@given(NAMES)
def test_names_are_split_where_webdataset_splits_them(name: str) -> None:
    key, extension = base_plus_ext(name)
    assert _split(name) == ((key, extension.lower()) if key is not None else (name, ""))
