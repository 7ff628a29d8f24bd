"""What a survey says is what NumPy says of the same documents, whoever read which shard."""

import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from rich.console import Console

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import ImagePolicy, decode_image
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import ASSUMED, DocumentFacts, ShardFacts
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shards.statistics import (
    ROW_LENGTHS,
    Distribution,
    Survey,
    TokenCount,
    survey,
)
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UnusableSampleError, UserError

PATCH_SIZE, MAX_PATCHES = 4, 30
PERCENTS = (5, 50, 95)


def picture(width: int, height: int, form: str = "JPEG", orientation: int = 1) -> bytes:
    """An encoded image that a viewer turns as EXIF says."""
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Pillow.new("RGB", (width, height), "red").save(file, form, exif=exif)
    return file.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def chat(question: str, answer: str) -> bytes:
    return json.dumps(
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    ).encode()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9)


@pytest.fixture
def tokenizer_file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path / "tokenizer.model")
    return tmp_path / "tokenizer.model"


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Documents of every kind, wide, tall, turned and over budget, among some that can't be used."""
    rng = np.random.default_rng(0)
    captions: dict[str, bytes] = {}
    for number in range(30):
        width, height = (int(side) for side in np.exp(rng.uniform(0, 5, 2)))
        captions[f"{number:02}.jpg"] = picture(width, height, orientation=1 + number % 8)
        captions[f"{number:02}.txt"] = b"a red square " * (1 + int(np.exp(rng.uniform(0, 5))))
    captions |= {"90.png": b"nothing", "90.txt": b"x", "91.png": picture(201, 1, "PNG"), "91.txt": b"x"}
    segments = [{"text": "4072"}, {"image": "a.png"}, {"text": "19 8 3"}, {"image": "b.webp"}]
    others = {
        "0.png": picture(40, 9, "PNG", orientation=6),
        "0.json": chat("<image>\nWhat is it?", "é"),
        "1.a.png": picture(9, 40, "PNG"),
        "1.b.webp": picture(33, 2, "WEBP", orientation=8),
        "1.json": json.dumps({"segments": segments}).encode(),
        "2.jsonl": b'{"text": "one"}\n{"text": "two"}\n' + chat("q", "a") + b"\n{}\n",
        "3.json": chat("q", ""),
        "4.txt": " ".join(map(str, range(4_000))).encode(),
    }
    paths = [write(tmp_path / "a.tar", captions), write(tmp_path / "b.tar", others)]
    cut = write(tmp_path / "c.tar", {f"{number}.txt": b"text" for number in range(9)})
    cut.write_bytes(cut.read_bytes()[: 512 * 9])
    return [*map(str, paths), str(cut)]


@pytest.mark.parametrize("budget", [1, 7, 30, 1024])
@pytest.mark.parametrize("patch_size", [1, 4, 16])
def test_tokens_are_those_of_the_sequence(
    tokenizer: Tokenizer, random_document: Callable[[int], Document], patch_size: int, budget: int
) -> None:
    policy = ImagePolicy(patch_size=patch_size, max_patches=budget)
    question, answer, caption = Text("What is it?", loss=False), Text("4072"), Text("a red square")
    wide, tall = Image(picture(61, 9)), Image(picture(9, 61, "PNG"))
    turned = [
        Image(picture(61, 9, form, orientation)) for form in ("JPEG", "PNG", "WEBP") for orientation in (3, 5, 8)
    ]
    documents = [random_document(seed) for seed in range(15)]
    documents += [
        Document("k", segments)
        for segments in (
            (wide, question, answer),
            (question, tall, answer, wide),  # the image, not the answer, is the end
            (question, Text("")),
            (wide, tall, caption, wide),
            (*turned, caption),
        )
    ]
    for document in documents:
        facts = DocumentFacts.of(document)
        counted = TokenCount(policy, tokenizer).of(document, facts)
        assert counted == len(SequenceBuilder(tokenizer, policy).build(document))
    assert {DocumentFacts.of(document).kind for document in documents} == {"caption", "chat", "interleaved", "text"}


def test_no_image_is_decoded(tokenizer: Tokenizer, make_png: Callable[..., bytes]) -> None:
    jpeg = io.BytesIO()
    with Pillow.open(io.BytesIO(make_png(90, 610))) as noise:
        noise.save(jpeg, "JPEG")
    for whole in (make_png(90, 610), jpeg.getvalue()):
        counts = []
        for data in (whole, whole[: len(whole) // 2]):
            document = Document("k", (Image(data), Text("a")))
            facts = DocumentFacts.of(document)
            counts.append(TokenCount(ASSUMED, tokenizer).of(document, facts))
        assert counts[0] == counts[1]
        with pytest.raises(UnusableSampleError, match="image-unreadable"):
            decode_image(data, ASSUMED)


def test_estimates_are_those_of_the_manifest(random_document: Callable[[int], Document]) -> None:
    for document in map(random_document, range(15)):
        facts = DocumentFacts.of(document)
        assert TokenCount(ASSUMED, None).of(document, facts) == facts.tokens()


def test_a_survey_says_what_numpy_says(
    shards: list[str], cache: ShardCache, tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    found = survey(shards, cache, tokenizer_file, PATCH_SIZE, MAX_PATCHES, 1)
    builder = SequenceBuilder(tokenizer, ImagePolicy(patch_size=PATCH_SIZE, max_patches=MAX_PATCHES))
    stats, kinds, tokens, text_bytes, sizes = SampleStats(), Counter[str](), [], [], []
    for shard in shards:
        for document in read_documents(Path(shard), stats):
            try:
                tokens.append(len(builder.build(document)))
            except UnusableSampleError as error:
                stats.skip(error)
                continue
            kinds[DocumentFacts.of(document).kind] += 1
            text_bytes.append(sum(len(text.encode()) for text in document.texts))
            for segment in document.segments:
                if isinstance(segment, Image):
                    with Pillow.open(io.BytesIO(segment.data)) as image:
                        turned = image.getexif().get(0x0112, 1) > 4
                        sizes.append(image.size[::-1] if turned else image.size)
    assert found.shards == 3
    assert found.kinds == kinds
    assert set(kinds) == {"caption", "chat", "interleaved", "text"}
    assert found.unusable == stats.skipped
    assert set(stats.skipped) == {
        "image-unreadable",
        "image-aspect",
        "format-unknown",
        "shard-broken",
        "nothing-to-learn",
    }
    assert stats.read == found.kinds.total() + found.unusable.total()
    assert found.longer == {length: sum(count > length for count in tokens) for length in ROW_LENGTHS}
    assert found.longer[8_192] > 0
    widths, heights = np.array(sizes).T
    assert found.sizes.total() == len(sizes)
    for values, known in (
        (found.widths, widths),
        (found.heights, heights),
        (found.aspects, widths / heights),
        (found.text_bytes, text_bytes),
        (found.tokens, tokens),
    ):
        assert values.counts.total() == len(known)
        assert (values.minimum, values.maximum) == (min(known), max(known))
        for percent in PERCENTS:
            assert values.percentile(percent) == pytest.approx(_percentile(known, percent), rel=1 / 256)


def _percentile(values: list, percent: int) -> float:
    return np.percentile(values, percent, method="inverted_cdf")


def test_without_a_tokenizer_documents_and_estimates_are_those_of_the_manifest(
    shards: list[str], cache: ShardCache
) -> None:
    found = survey(shards, cache, None, 16, 1024, 1)
    facts = [ShardFacts.of(Path(shard)) for shard in shards]
    assert found.kinds == sum((Counter(one.kinds) for one in facts), Counter())
    assert found.unusable == sum((Counter(one.unusable) for one in facts), Counter())
    assert found.widths.counts.total() == sum(one.images for one in facts)
    assert not found.exact


def test_who_reads_which_shard_when_makes_no_difference(
    shards: list[str], cache: ShardCache, tokenizer_file: Path
) -> None:
    known = survey(shards, cache, tokenizer_file, PATCH_SIZE, MAX_PATCHES, 1)
    assert survey(shards[::-1], cache, tokenizer_file, PATCH_SIZE, MAX_PATCHES, 2) == known
    parts = [survey([shard], cache, tokenizer_file, PATCH_SIZE, MAX_PATCHES, 1) for shard in shards]
    sum_of_parts = Survey(images=known.images, exact=True)
    for part in (parts[1], parts[2], parts[0]):
        sum_of_parts.add(part)
    assert sum_of_parts == known


@given(
    values=st.lists(st.integers(0, 2**26) | st.floats(1 / 200, 200), min_size=1),
    percent=st.sampled_from(PERCENTS),
)
def test_percentiles_are_off_by_what_is_said_at_most(values: list[float], percent: int) -> None:
    distribution, halves = Distribution(), (Distribution(), Distribution())
    for number, value in enumerate(values):
        distribution.record(value)
        halves[number % 2].record(value)
    known = _percentile(values, percent)
    assert abs(distribution.percentile(percent) - known) <= 0.004 * known
    if known == int(known) <= 256:
        assert distribution.percentile(percent) == known
    halves[1].add(halves[0])
    assert halves[1] == distribution


def test_a_distribution_stays_small() -> None:
    distribution = Distribution()
    for value in range(256, 2**14):
        distribution.record(value)
    assert len(distribution.counts) == 6 * 128 + 1
    assert distribution.counts[300] == 2  # no step takes more than its share: 299 and 300, not 301


def shown(found: Survey) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(found.table())
    return console.file.getvalue()


def test_the_table_says_it_all_in_80_columns(shards: list[str], cache: ShardCache, tokenizer_file: Path) -> None:
    found = survey(shards, cache, tokenizer_file, PATCH_SIZE, MAX_PATCHES, 1)
    lines = [line.split() for line in shown(found).splitlines()]
    usable, unusable = found.kinds.total(), found.unusable.total()
    assert ["documents", str(usable + unusable)] in lines
    assert ["unusable:", "image-aspect", "1", *f"{100 / (usable + unusable):.1f} %".split()] in lines
    assert ["more", "than", "8,192", "tokens", "1", *f"{100 / usable:.1f} %".split()] in lines
    assert ["images", str(found.widths.counts.total())] in lines
    between = [f"{found.tokens.percentile(percent):,.0f}" for percent in PERCENTS]
    assert ["tokens", f"{found.tokens.minimum:,}", *between, f"{found.tokens.maximum:,}"] in lines
    estimated = shown(survey(shards[1:2], cache, None, PATCH_SIZE, MAX_PATCHES, 1))
    assert "tokens, estimated" in estimated
    assert "4 bytes of text" in estimated


def test_a_picture_is_drawn_of_all_documents_or_none(tmp_path: Path, shards: list[str], cache: ShardCache) -> None:
    broken = write(tmp_path / "broken.tar", {"0.png": b"nothing", "0.txt": b"x"})
    single = write(tmp_path / "single.tar", {"0.png": picture(64, 64, "PNG"), "0.txt": b"x"})
    colored = []
    for number, chosen in enumerate((shards, [str(single)], [str(broken)])):
        found = survey(chosen, cache, None, PATCH_SIZE, MAX_PATCHES, 1)
        found.draw(tmp_path / "new" / f"{number}.png")
        with Pillow.open(tmp_path / "new" / f"{number}.png") as drawn:
            assert drawn.format == "PNG"
            pixels = np.asarray(drawn.convert("RGB"), np.int16)
        quarters = [part for half in np.array_split(pixels, 2) for part in np.array_split(half, 2, axis=1)]
        colored.append([float((np.ptp(part, axis=-1) > 40).mean()) for part in quarters])
    assert min(colored[0] + colored[1]) > 0.001
    assert max(colored[2]) == 0
    assert "-" in shown(found)


def test_what_is_lacking_is_named(
    tmp_path: Path, shards: list[str], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = survey(shards[1:2], cache, None, PATCH_SIZE, MAX_PATCHES, 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'fuyu-e2e\[plots\]'"):
        found.draw(tmp_path / "shards.png")
    with pytest.raises(UserError, match=r"gone\.model can't be read"):
        survey(shards, cache, tmp_path / "gone.model", PATCH_SIZE, MAX_PATCHES, 1)
    with pytest.raises(UserError, match="patch_size is 0"):
        survey(shards, cache, None, 0, MAX_PATCHES, 1)
