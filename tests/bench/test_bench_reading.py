"""The benchmarks of reading run, at a size that teaches nothing, and leave figures and pictures."""

import json
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

import fuyu_e2e.studies.resolution as bench_resolution
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.rope import rotary
from fuyu_e2e.studies.ocr import ocr
from fuyu_e2e.studies.resolution import resolution, stretched
from fuyu_e2e.studies.sort_of_clevr import sort_of_clevr
from fuyu_e2e.training.settings.recipe import FuyuCLI

pytestmark = [
    pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws pictures: pip install matplotlib"),
]


def test_stretching_slows_the_slowest_rotary_wave_alone(config: FuyuConfig) -> None:
    def waves(decoder: FuyuConfig) -> np.ndarray:
        cos, sin = rotary(torch.tensor([1]), decoder.rotary_size, decoder.rope_theta)
        return torch.atan2(sin, cos)[0, 0, : decoder.rotary_size // 2].double().numpy()

    ratios = waves(config) / waves(stretched(config, 3.0))
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(3, rel=1e-4)
    assert (np.diff(ratios) > 0).all()


@pytest.mark.slow
def test_resolution_scores_each_contender_once_at_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_resolution, "TEST_SIZES", ((32, 32), (80, 80), (160, 54), (160, 160)))
    arguments = ["--runs", str(tmp_path / "runs"), "--pictures", "90", "--test-pictures", "3", "--max-steps", "2"]
    arguments += ["--out", str(tmp_path / "resolution.json")]
    resolution([*arguments, "--contenders", "mixed"])
    resolution([*arguments, "--contenders", "mixed", "square"])
    mixed, square = json.loads((tmp_path / "resolution.json").read_text())["runs"]
    assert (mixed["run"], square["run"], mixed["steps"], square["steps"]) == ("mixed-0", "square-0", 2, 2)
    assert [score["trained"] for score in mixed["scores"]] == ["yes", "between", "beyond", "beyond"]
    assert [score["tokens"] for score in mixed["scores"]] == [6, 30, 50, 110]
    assert {score["tokens"] for score in square["scores"]} == {20}
    assert [score["size"] for score in mixed["stretched"]] == ["160x54", "160x160"]
    assert Pillow.open(tmp_path / "resolution.png").width > 800


def test_the_reading_recipe_and_its_score_by_the_height_of_letters(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, as docs/ocr.md has it; two fonts represent those trained on and held out."""
    (fonts := tmp_path / "fonts").mkdir()
    drawn = Path(find_spec("matplotlib").submodule_search_locations[0]) / "mpl-data/fonts/ttf"  # type: ignore
    shutil.copy(drawn / "DejaVuSans.ttf", fonts / "DejaVuSans.ttf")
    shutil.copy(drawn / "DejaVuSerif.ttf", fonts / "Hack-Regular.ttf")
    main = runpy.run_path(str(repository / "data/rendered_text.py"))["main"]
    recipe = shipped("recipes/ocr.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    main(["--fonts", str(fonts), "--pictures", "120", "--test-pictures", "14"])
    FuyuCLI(
        ["fit", f"--config={recipe}", "--trainer.default_root_dir=runs/ocr", "--trainer.max_steps=2",
         "--trainer.val_check_interval=2"]
    )  # fmt: skip
    ocr([])
    results = json.loads(Path("bench-ocr.json").read_text())
    for split in ("test", "test-known-fonts"):
        found = results[split]["metrics"]["character_error_rate"]
        assert [score["questions"] for score in found["groups"]["height"].values()] == [2] * 7
        assert list(found["groups"]["height"])[0::6] == ["06-07", "31-40"]
        assert found["all"]["value"] > 0.5
        assert set(found["blind"]) == {"without_image", "other_image"}
    assert Path("bench-ocr.png").stat().st_size > 5_000
    assert Path("bench-ocr-test-wrong.png").stat().st_size > 1_000


def test_the_curve_of_sort_of_clevr_scores_each_checkpoint_and_the_last_on_more(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, as docs/sort-of-clevr.md has it."""
    main = runpy.run_path(str(repository / "data/sort_of_clevr.py"))["main"]
    recipe = shipped("recipes/sort-of-clevr.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    main(["--images", "60", "--fewer", "2", "--close-calls", "2", "--test-images", "3", "--processes", "1"])
    FuyuCLI(
        ["fit", f"--config={recipe}", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
         "--checkpoint.every_n_train_steps=1", "--data.budget=512"]
    )  # fmt: skip
    sort_of_clevr(["--runs", "runs/sort-of-clevr", "--images", "1", "--last-images", "2", "--out", "curve.json"])
    (run,) = json.loads(Path("curve.json").read_text())["runs"]
    assert [(point["step"], point["images"]) for point in run["curve"]] == [(1, 1), (2, 2)]
    assert 0 < run["curve"][0]["tokens"] < run["curve"][1]["tokens"] <= 2 * 512
    assert {"relational", "non-relational", "left", "furthest"} <= set(run["curve"][1])
    assert Path("curve.png").stat().st_size > 5_000
