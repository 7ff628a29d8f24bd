"""Checkpoints that earlier code wrote load, write what they wrote, are trained on and exported.

`earlier/make.py` made them, with the code of before blocks were given rows.
"""

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.cli.export import export
from fuyu_e2e.training.settings.recipe import FuyuCLI

EARLIER = Path(__file__).with_name("earlier")
MADE = json.loads((EARLIER / "made.json").read_text())
_spec = spec_from_file_location("earlier_make", EARLIER / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_it_writes_what_it_wrote(name: str) -> None:
    assert make.written(EARLIER / f"{name}.ckpt") == MADE[name]["written"]


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_its_run_goes_on_as_it_did(name: str, tmp_path: Path) -> None:
    for part in ("train.tar", "tokenizer.model"):
        shutil.copy(EARLIER / part, tmp_path)
    run = tmp_path / "run"
    shutil.copytree(EARLIER / f"{name}.ckpt", run / "checkpoints" / f"step={make.STEPS // 2}.ckpt")
    cli = FuyuCLI(make.settings(tmp_path, name, run), run=False)
    losses: list[float] = []
    cli.model.on_train_batch_end = lambda *_: losses.append(float(cli.trainer.callback_metrics["train/loss"]))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=run / "checkpoints")
    assert losses == pytest.approx(MADE[name]["losses"][make.STEPS // 2 :], abs=1e-4)


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_its_export_writes_the_same(name: str, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert export(["--checkpoint", str(EARLIER / f"{name}.ckpt"), "--out", str(out)]) == 0
    assert make.written(out) == MADE[name]["written"]
    original, exported = (load_model(path, torch.device("cpu")) for path in (EARLIER / f"{name}.ckpt", out))
    assert all(map(torch.equal, original.decoder.parameters(), exported.decoder.parameters()))
