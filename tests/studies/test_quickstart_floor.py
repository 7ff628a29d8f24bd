"""The quickstart's model sees: after a part of its steps it reads far better with the right picture than with another.

A change that breaks learning may leave every other test green. What a short run comes to differs from machine to
machine, since sums in another order lead it elsewhere; so it is run with one thread, with two, and with kernels that
add up in another order, and has to clear a floor that all three clear by far.
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.eval.blind import with_images_of
from fuyu_e2e.studies.quickstart import Workplace, recipe_settings, write_data

STEPS = 1_000
"""Of the quickstart's 2,600. Until about step 500 the model reads no picture at all."""
MARGIN = 0.5
"""Nats a supervised token by which the loss has to lie below that with pictures exchanged."""
MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "another order of sums": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("quickstart"))
    write_data(place.data, seed=0, pictures=40_000, test_pictures=1)
    return place


def mean_loss(model: TrainedModel, documents: Sequence[Document]) -> float:
    """Nats a supervised token."""
    losses = [model.decoder.score_tokens(pack_row([model.builder.build(document)])).losses for document in documents]
    return float(torch.cat(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_a_short_run_sees(machine: str, place: Workplace, tmp_path: Path) -> None:
    settings = recipe_settings(place, "recipes/quickstart.yaml", 0, STEPS)
    command = [sys.executable, "-m", "fuyu_e2e", "fit", *settings, f"--trainer.default_root_dir={tmp_path}"]
    subprocess.run(command, check=True, env=os.environ | MACHINES[machine], capture_output=True, timeout=3_600)
    model = load_model(tmp_path / "checkpoints" / "last.ckpt")
    assert model.step == STEPS
    [shard] = place.data.glob("val-*.tar")
    read = list(read_documents(shard, SampleStats()))
    exchanged = [with_images_of(own, other) for own, other in zip(read, read[-1:] + read[:-1], strict=True)]
    seen, blind = mean_loss(model, read), mean_loss(model, exchanged)
    assert math.isfinite(seen)
    assert seen < blind - MARGIN
    # Exchanged pictures mislead a model that looks: the blind loss proper is that of the plateau, about 1.75.
    assert seen < 1.75 - MARGIN
