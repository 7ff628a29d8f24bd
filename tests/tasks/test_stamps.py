"""The stamps task: names are what the texts say, boxes hold what was pasted, and what is held out is in no training.

All with tiny stamps that are made here; Debian's package is not needed.
"""

import importlib.util
import json
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import UInt8
from PIL import Image as Pillow

from fuyu_e2e.data.document import Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.metrics.boxes import read_box
from fuyu_e2e.studies.stamps import stamps as study
from fuyu_e2e.tasks import stamps
from fuyu_e2e.tasks.stamp_kinds import ENGLISH_ARTICLE, GERMAN_ARTICLE, Kind, is_held_out, read_kinds, short_name
from fuyu_e2e.tasks.stamps import APART, COVERED, OVERLAP, SIDES, SMALL_SIDES, Pictures, write_shards

SPLITS = ("train-one", "train", "val", "test", "test-new-combinations", "test-new-photographs")
STAMPS = {
    "animals/cats/cartoon/lion": ("A happy lion!", "Ein fröhlicher Löwe!"),
    "animals/cats/lion": ("A lion.", "Ein Löwe."),
    "animals/sea_lion": ("A sea lion.", "Ein Seelöwe."),
    "animals/tiger": ("A tiger.", "Ein Tiger."),
    "animals/tiger_sumatran": ("A Sumatran tiger.", "Ein Sumatratiger."),
    "animals/peacock": ("A peacock (a male peafowl).", "Ein (männlicher) Pfau."),
    "animals/crow": ("A crow.", "Eine Krähe."),
    "animals/crow2": ("A black crow.", "Eine schwarze Krähe."),
    "animals/owl": ("An owl.", "Eine Eule."),
    "food/apple": ("A “Fuji” apple.", "Ein »Fuji«-Apfel."),
    "food/apple_red": ("A red apple.", "Ein roter Apfel."),
    "food/lemon": ("A yellow lemon.", "Eine gelbe Zitrone."),
    "food/lemon2": ("A yellow lemon.", "Eine gelbe Zitrone."),
    "food/mandarin": ("A mandarin orange.", "Eine Mandarine."),
    "food/orange": ("An orange.", "Eine Orange."),
    "food/lettuce": ("A head of lettuce.", "Ein Kopfsalat."),
    "food/broccoli": ("Eat your broccoli!", "Iss deinen Brokkoli!"),
    "household/mug": ("A mug.", "Ein Becher."),
    "household/saw": ("A saw.", "Eine Säge."),
    "household/key_without_german": ("A key.", ""),
    "symbols/x": ("A letter.", "Ein Buchstabe."),
    "people/cartoon/mermaid": ("A mermaid.", "Eine Meerjungfrau."),
}
KNOWN = {
    "apple": ("Apfel", ["apple", "apple_red"]),
    "crow": ("Krähe", ["crow", "crow2"]),
    "lion": ("Löwe", ["lion", "lion"]),
    "mug": ("Becher", ["mug"]),
    "orange": ("Orange", ["orange"]),
    "owl": ("Eule", ["owl"]),
    "peacock": ("Pfau", ["peacock"]),
    "saw": ("Säge", ["saw"]),
    "tiger": ("Tiger", ["tiger", "tiger_sumatran"]),
    "yellow lemon": ("gelbe Zitrone", ["lemon", "lemon2"]),
}
"""The kinds among them: German name, and names of files."""


def draw_stamp(rng: np.random.Generator) -> Pillow.Image:
    """An ellipse of noise with a soft edge, on a transparent ground, not in the middle."""
    height, width = rng.integers(20, 60, 2)
    rows, columns = np.mgrid[:height, :width]
    alpha = 255 * 3 * (1 - ((2 * rows / height - 1) ** 2 + (2 * columns / width - 1) ** 2))
    values = np.dstack([rng.integers(0, 256, (height, width, 3)), alpha.clip(0, 255)]).astype(np.uint8)
    return Pillow.fromarray(np.pad(values, (tuple(rng.integers(0, 9, 2)), (3, 7), (0, 0))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the package's."""
    folder = tmp_path_factory.mktemp("stamps")
    rng = np.random.default_rng(0)
    for name, (english, german) in STAMPS.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_stamp(rng).save(path)
        texts = [english, "ast.utf8=Una cosa.", *([f"de.utf8={german}"] if german else []), "fr.utf8=Une chose."]
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    draw_stamp(rng).save(folder / "animals/crow_mirror.png")
    (folder / "animals/crow_mirror.txt").write_text("A crow.\nde.utf8=Eine Krähe.\n", encoding="utf-8")
    draw_stamp(rng).save(folder / "animals/without_text.png")
    for extension in ("png", "txt"):  # the same picture twice
        copy = folder / f"household/mug_copy.{extension}"
        copy.write_bytes((folder / f"household/mug.{extension}").read_bytes())
    return folder


@pytest.fixture(scope="module")
def kinds(folder: Path) -> tuple[Kind, ...]:
    return read_kinds(folder)


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    """data/stamps.py."""
    spec = importlib.util.spec_from_file_location("stamps_script", repository / "data/stamps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kinds_are_named_as_the_texts_say_in_both_languages(kinds: tuple[Kind, ...]) -> None:
    found = {kind.english: (kind.german, [path.stem for path in kind.stamps]) for kind in kinds}
    assert found == KNOWN
    assert list(found) == sorted(found)


def test_kinds_with_several_stamps_come_first(folder: Path) -> None:
    assert [kind.english for kind in read_kinds(folder, most=5)] == ["apple", "crow", "lion", "tiger", "yellow lemon"]
    assert {"apple", "crow", "lion", "tiger", "yellow lemon"} < {kind.english for kind in read_kinds(folder, most=6)}


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("A cheetah.", "cheetah"),
        ("The Sun.", "Sun"),
        ("A Jack-o’-lantern.", "Jack-o’-lantern"),
        ("A very poisonous lionfish!", "very poisonous lionfish"),
        ("A very poisonous old lionfish!", None),
        ("Animals.", None),
        ("An", None),
        ("", None),
        ("The Earth. Our planet!", None),
        ("A glass of water.", None),
    ],
)
def test_a_short_name_is_a_noun_phrase_without_its_article(phrase: str, name: str | None) -> None:
    assert short_name(phrase, ENGLISH_ARTICLE) == name


def test_a_german_name_keeps_its_spelling() -> None:
    assert short_name("Ein Gepard.", GERMAN_ARTICLE) == "Gepard"
    assert short_name("Eine gelbe Möve", GERMAN_ARTICLE) == "gelbe Möve"
    assert short_name("Eine Spinne, die Fußball spielt.", GERMAN_ARTICLE) is None


def test_a_folder_without_stamps_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tuxpaint-stamps-default by --stamps"):
        read_kinds(tmp_path)


def test_without_the_package_and_apt_the_sentence_says_what_to_do(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "INSTALLED", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UserError, match=r"no apt-get .* unpack Debian's package .* by --stamps"),
        script.find_stamps(None),
    ):
        pass
    with script.find_stamps(tmp_path) as found:
        assert found == tmp_path


def test_a_download_that_fails_is_told(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(script, "INSTALLED", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="run apt-get update as root, or unpack"), script.find_stamps(None):
        pass


def test_a_download_is_unpacked_and_removed_afterwards(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "missing/stamps"
    (tmp_path / "apt-get").write_text('#!/bin/sh\n[ "$1" = download ] && echo "$3" > "$3.deb"\n')
    (tmp_path / "dpkg-deb").write_text(f'#!/bin/sh\n[ -f "$2" ] && /bin/mkdir -p "$3{installed}"\n')
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(script, "INSTALLED", installed)
    monkeypatch.setenv("PATH", str(tmp_path))
    with script.find_stamps(None) as found:
        assert found.is_dir()
        assert found != installed
    assert not found.exists()


def covered(pictures: Pictures, number: int) -> tuple[UInt8[np.ndarray, "H W"], tuple[stamps.Placed, ...]]:
    """How opaque a picture's stamps are, from the picture drawn on black and on white; and what it says of them."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        for value in (0, 255):

            def ground(rng: np.random.Generator, height: int, width: int, value: int = value) -> np.ndarray:
                return np.full((height, width, 3), value, np.float32)

            patch.setattr(stamps, "draw_ground", ground)
            drawn.append(pictures.sample(number)[0])
    black, white = (composed.pixels.astype(int) for composed in drawn)
    assert drawn[0].stamps == drawn[1].stamps
    return (255 - (white - black)).min(axis=2), drawn[0].stamps


@given(number=st.integers(0, 10_000), split=st.sampled_from(SPLITS))
def test_boxes_hold_what_was_pasted_and_all_is_inside(
    kinds: tuple[Kind, ...], number: int, split: stamps.Split
) -> None:
    opacity, placed = covered(Pictures(split=split, seed=3, kinds=kinds), number)
    height, width = opacity.shape
    low, high = SMALL_SIDES if split == "train-one" else SIDES
    assert low <= min(height, width) <= max(height, width) <= min(high, 2 * min(height, width))
    outside = opacity.copy()
    for stamp in placed:
        top, left, bottom, right = stamp.box
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        outside[top:bottom, left:right] = 0
    assert outside.max() == 0
    if len(placed) == 1:
        # Rounding of colours makes an opacity uncertain by one.
        rows, columns = np.nonzero(opacity > COVERED + 1)
        assert 0 <= rows.min() - top <= 1
        assert 0 <= columns.min() - left <= 1
        assert 0 <= bottom - 1 - rows.max() <= 1
        assert 0 <= right - 1 - columns.max() <= 1


@given(number=st.integers(0, 10_000), split=st.sampled_from(SPLITS))
def test_answers_say_what_the_picture_shows(kinds: tuple[Kind, ...], number: int, split: stamps.Split) -> None:
    composed, asked = Pictures(split=split, seed=3, kinds=kinds).sample(number)
    placed = composed.stamps
    centres = [(stamp.box[1] + stamp.box[3]) / 2 for stamp in placed]
    assert all(right - left >= APART for left, right in pairwise(centres))
    for one, other in combinations(placed, 2):
        inter = max(0, min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])) * max(
            0, min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
        )
        areas = [(bottom - top) * (right - left) for top, left, bottom, right in (one.box, other.box)]
        assert inter <= OVERLAP * min(areas)
    assert len({stamp.kind for stamp in placed}) == len(placed)
    if asked.groups["question"] == "box":
        [about] = [stamp for stamp in placed if asked.text == f"Where is the {stamp.kind.english}?"]
        assert read_box(asked.answer) == about.box
        sides, size, count = [about.side], asked.groups["size"], asked.groups["among"]
    else:
        german = asked.groups["question"] == "German"
        assert asked.text == ("Was ist auf dem Bild?" if german else "What is in the picture?")
        assert asked.answer.split(", ") == [stamp.kind.german if german else stamp.kind.english for stamp in placed]
        sides, size, count = [stamp.side for stamp in placed], asked.groups["smallest"], asked.groups["named"]
    assert count == str(len(placed))
    low, high = map(int, size.split("-"))
    assert low <= min(sides) <= high or min(sides) < low == 24


def samples(kinds: tuple[Kind, ...], split: stamps.Split, count: int = 120) -> Iterator[tuple[stamps.Placed, ...]]:
    pictures = Pictures(split=split, seed=1, kinds=kinds)
    return (pictures.sample(number)[0].stamps for number in range(count))


def test_what_tests_hold_out_is_in_no_training_picture(kinds: tuple[Kind, ...]) -> None:
    pairs: dict[str, set[frozenset[str]]] = {}
    shown: dict[str, set[Path]] = {}
    for split in SPLITS:
        drawn = list(samples(kinds, split))  # type: ignore[arg-type]
        names = [[stamp.kind.english for stamp in placed] for placed in drawn]
        pairs[split] = {frozenset(pair) for own in names for pair in combinations(own, 2)}
        shown[split] = {stamp.path for placed in drawn for stamp in placed}
        if split == "test-new-combinations":
            held_out = {frozenset((a.english, b.english)) for a, b in combinations(kinds, 2) if is_held_out(a, b)}
            assert all({frozenset(pair) for pair in combinations(own, 2)} & held_out for own in names)
    assert held_out
    assert not pairs["train-one"]
    for split in set(SPLITS) - {"test-new-combinations"}:
        assert not pairs[split] & held_out
    known = {path for kind in kinds for path in (kind.stamps if len(kind.stamps) == 1 else kind.stamps[:-1])}
    for split in set(SPLITS) - {"test-new-photographs"}:
        assert shown[split] == known
    assert shown["test-new-photographs"] == {kind.stamps[-1] for kind in kinds if len(kind.stamps) > 1}


def test_too_few_kinds_are_told(kinds: tuple[Kind, ...]) -> None:
    for split in ("test-new-photographs", "test-new-combinations"):
        with pytest.raises(UserError, match=f"too few for . in a picture of {split}"):
            Pictures(split=split, seed=0, kinds=kinds[:1]).sample(3)  # type: ignore[arg-type]


def test_a_pair_is_held_out_either_way_around(kinds: tuple[Kind, ...]) -> None:
    many = [Kind(f"kind {number}", f"Art {number}", ()) for number in range(40)]
    shares = [is_held_out(one, other) for one, other in combinations(many, 2)]
    assert shares == [is_held_out(other, one) for one, other in combinations(many, 2)]
    assert 0.15 < np.mean(shares) < 0.25


def test_questions_and_numbers_of_stamps_occur_equally_often(kinds: tuple[Kind, ...]) -> None:
    for split, numbers in (("test", "123"), ("test-new-combinations", "23"), ("train-one", "1")):
        pictures = Pictures(split=split, seed=0, kinds=kinds)  # type: ignore[arg-type]
        drawn = [pictures.sample(number) for number in range(18)]
        found = [(asked.groups["question"], str(len(composed.stamps))) for composed, asked in drawn]
        expected = {(question, number) for question in ("English", "German", "box") for number in numbers}
        assert set(found) == expected
        assert {found.count(pair) for pair in expected} == {18 // len(expected)}


def test_shards_hold_one_question_each_and_are_the_same_written_anew(kinds: tuple[Kind, ...], tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        pictures = Pictures(split="test", seed=3, kinds=kinds)
        pictures.sample(len(written))
        paths = write_shards(tmp_path / name, pictures, 9, processes=1, shard_size=4)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert [path.name for path in paths] == ["test-00000.tar", "test-00001.tar", "test-00002.tar"]
    found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert len({sample["jpg"] for sample in found}) == len(found) == 9
    for sample in found:
        question, answer = (turn["value"] for turn in json.loads(sample["json"])["conversations"])
        assert question.endswith("?\n<image>")
        assert answer
    assert {tuple(map(type, one.segments)) for one in read_documents(paths[0], SampleStats())} == {(Text, Image, Text)}


def test_splits_and_seeds_share_no_picture(kinds: tuple[Kind, ...]) -> None:
    drawn = [
        {Pictures(split=split, seed=seed, kinds=kinds).sample(number)[0].pixels.tobytes() for number in range(9)}  # type: ignore[arg-type]
        for split, seed in (("train", 0), ("train", 1), ("train-one", 0), ("test", 0), ("val", 0))
    ]
    assert len(set.union(*drawn)) == 45


def test_the_script_writes_all_splits_and_a_tokenizer(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path), "--stamps", str(folder), "--pictures", "30", "--test-pictures", "9"]
    script.main([*options, "--processes", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.model", *(f"{name}-00000.tar" for name in SPLITS)}
    assert "30 training pictures of 10 kinds" in capsys.readouterr().out


@pytest.mark.slow
def test_the_study_trains_each_seed_once_and_scores_it_on_all_tests(folder: Path, tmp_path: Path) -> None:
    pictures = f"data/stamps.py --stamps {folder} --pictures 40 --test-pictures 9 --processes 1"
    options = [
        "--runs",
        str(tmp_path),
        "--pictures",
        pictures,
        "--max-steps",
        "1",
        "--out",
        str(tmp_path / "out.json"),
    ]
    study([*options, "--seeds", "0"])
    written_at = (tmp_path / "seed-0/scores.json").stat().st_mtime_ns
    study([*options, "--seeds", "0", "1"])
    assert (tmp_path / "seed-0/scores.json").stat().st_mtime_ns == written_at
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["seed"], run["steps"]) for run in runs] == [(0, 1), (1, 1)]
    for split in SPLITS[3:]:
        metrics = runs[1][split]["metrics"]
        by_question = {
            name: scored["questions"] for name, scored in metrics["exact_match"]["groups"]["question"].items()
        }
        assert by_question == {"English": 3, "German": 3, "box": 3}
        assert metrics["exact_match"]["groups"]["question"]["German"]["value"] == 0
        assert metrics["box_iou"]["groups"]["question"]["German"]["value"] is None
        assert metrics["box_iou"]["all"]["value"] == metrics["box_iou_50"]["all"]["value"] == 0
        assert set(metrics["box_iou"]["blind"]) == {"without_image", "other_image"}
    assert (tmp_path / "seed-1/test-wrong.png").exists()
