"""What a run is said to take is what it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuyu_e2e.bench.own_process import peak_memory
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.device_limits import known_peak, named_peak
from fuyu_e2e.training.estimate import estimated, show
from fuyu_e2e.training.settings.recipe import FuyuCLI

DECODER = {
    "vocab_size": 320,
    "patch_size": 4,
    "layers": 4,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 64,
    "feed_forward": 768,
}


def arguments(folder: Path, *settings: str) -> list[str]:
    return [
        *(f"--model.decoder.{name}={value}" for name, value in DECODER.items()),
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--data.tokenizer={folder / 'tokenizer.model'}",
        "--trainer.max_steps=3",
        "--trainer.accelerator=cpu",
        "--data.budget=4096",
        "--data.lanes=1",
        *settings,
    ]


def test_a_run_takes_the_memory_that_was_estimated(
    tmp_path: Path, question_data: Callable[..., FuyuDataModule]
) -> None:
    question_data()
    settings = arguments(tmp_path, f"--data.train={tmp_path / 'train.tar'}")
    expected = estimated(settings)
    assert "first row of data.train" in expected.row.source
    assert expected.row.targets > 100
    assert expected.memory.total > 2**28
    peak = peak_memory(FuyuCLI, ["fit", *settings, "--trainer.enable_progress_bar=false"])
    assert peak == pytest.approx(expected.memory.total, rel=0.15)


def test_tokens_and_hours_follow_from_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--trainer.accumulate_grad_batches=2", "--trainer.devices=4", "--device=a100", "--mfu=0.5"]
    found = estimated(arguments(tmp_path, *settings))
    assert found.precision == "bf16-mixed", "what a GPU gets"
    assert found.rows == 3 * 2 * 4
    assert estimated(arguments(tmp_path, *settings, "--rows_per_step=12")).rows == 3 * 12
    assert found.tokens == found.rows * 4_096
    assert found.hours * 3600 == pytest.approx(found.rows * found.cost.training_flops / (312e12 * 0.5 * 4))
    assert found.memory.gradients == 2 * found.memory.weights
    show(estimated(arguments(tmp_path, *settings, "--trainer.precision=32-true")))
    shown = capsys.readouterr().out
    assert f"{found.cost.parameters:,}" in shown
    assert "4 x a100: 1.95e+13 operations/s, of which 50% are assumed" in shown
    assert "documents of 512 tokens, half of them patches" in shown


def test_this_machine_is_measured(tmp_path: Path) -> None:
    found = estimated(arguments(tmp_path))
    assert 1e8 < found.rate < 1e15
    assert found.hours > 0


@pytest.mark.parametrize(("name", "problem"), [("h100", "could be h100"), ("abacus", "is unknown"), ("t4", "does no")])
def test_a_card_that_is_not_known_is_refused(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"--device {name} {problem}"):
        named_peak(name, torch.bfloat16)


def test_a_card_counts_with_its_rate_for_dense_products() -> None:
    assert named_peak("H200-SXM1", torch.bfloat16) == 989.5e12
    assert named_peak("h100 sxm", torch.bfloat16) == 989.4e12


@pytest.mark.parametrize(
    ("driver", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_the_card_that_is_there_counts_the_same(driver: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: driver)
    assert known_peak(torch.device("cuda"), torch.bfloat16) == peak
    torch.set_float32_matmul_precision("highest")
    if "H200" in driver or "NVL" in driver:  # float32 has no sparse products
        assert known_peak(torch.device("cuda"), torch.float32) == (60e12 if "NVL" in driver else 67e12)


def test_the_peak_of_a_processor_is_not_known() -> None:
    assert known_peak(torch.device("cpu"), torch.float32) is None


def test_a_share_of_the_device_above_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--mfu is 40"):
        estimated(arguments(tmp_path, "--mfu=40"))
