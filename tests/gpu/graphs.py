"""How many graphs a compiled run makes, and whether its blocks still run compiled after validation and generation.

The real trainer, with `model.compile`: steps, a validation with generated samples after it, and so on. A block that
met more shapes than torch compiles a function for runs uncompiled from then on, which nothing but time tells. On a CPU
graphs are counted and not compiled.
"""

from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import torch._inductor.compile_fx as inductor
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.bench.limit import prepare, quickstart_run
from fuyu_e2e.bench.measure import Figures, environment
from fuyu_e2e.tasks.digits import write_shards

STEPS = 18
BETWEEN = 6
"""Steps between two validations."""
PER_BLOCK = 2
"""Graphs that a block may have in training: for the first row's shapes, and for all others."""


class Graphs:
    """Stands before the compiler: counts the graphs that it is given, and their calls."""

    def __init__(self, compiles: bool) -> None:
        self.made = self.called = 0
        self._compile = inductor.compile_fx if compiles else lambda graph, *_, **__: graph.forward

    def __call__(self, graph: Any, *args: Any, **settings: Any) -> Any:
        self.made += 1
        run = self._compile(graph, *args, **settings)

        def counted(*inputs: Any) -> Any:
            self.called += 1
            return run(*inputs)

        return counted


class Phases(Callback):
    """What was made and called in each batch of training and of validation, and in the samples after it."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self.phases: list[dict[str, Any]] = []
        self._before = (0, 0)

    def _begin(self, *_: Any) -> None:
        self._before = (self.graphs.made, self.graphs.called)

    def _end(self, phase: str) -> None:
        made, called = self._before
        self.phases.append({"phase": phase, "made": self.graphs.made - made, "called": self.graphs.called - called})

    on_train_batch_start = on_validation_batch_start = on_validation_epoch_end = _begin

    def on_train_batch_end(self, *_: Any) -> None:
        self._end("training")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._end("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end("generation")  # this callback is after the one that generates


def judge(phases: list[dict[str, Any]], blocks: int) -> list[dict[str, Any]]:
    """What is to hold of a run's phases, in their order."""
    first_round = next(number for number, phase in enumerate(phases) if phase["phase"] == "generation") + 1
    trained = sum(phase["made"] for phase in phases if phase["phase"] == "training")
    later = sum(phase["made"] for phase in phases[first_round:])
    checks = [
        {
            "what": "graphs made in training",
            "measured": trained,
            "expected": f"at most {PER_BLOCK * blocks}, {PER_BLOCK} a block",
            "holds": trained <= PER_BLOCK * blocks,
        },
        {
            "what": "graphs made after the first validation and its samples",
            "measured": later,
            "expected": "none",
            "holds": later == 0,
        },
    ]
    for name in ("training", "validation"):
        calls = sorted({phase["called"] for phase in phases if phase["phase"] == name})
        checks.append(
            {
                "what": f"graphs that run in a batch of {name}",
                "measured": calls,
                "expected": f"one number, {blocks} or, where blocks are in pieces, more",
                "holds": len(calls) == 1 and calls[0] >= blocks,
            }
        )
    return checks


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = Figures(options.out, environment(device) | {"steps": STEPS, "steps_between_validations": BETWEEN})
    inductor.compile_fx = graphs = Graphs(compiles=device == "cuda")
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        write_shards(folder, split="val", count=200, seed=1, most_digits=4, processes=1)
        further = ("--model.compile=true", f"--trainer.val_check_interval={BETWEEN}", f"--data.val={folder}/val-*.tar")
        run = quickstart_run(folder, device, STEPS, further)
        phases = Phases(graphs)
        run.trainer.callbacks.append(phases)
        try:
            run.trainer.fit(run.model, datamodule=run.datamodule)
        finally:
            figures.keep(phases=phases.phases)
    figures.end(checks=judge(phases.phases, run.model.config.layers))


if __name__ == "__main__":
    main()
