"""Runs a grid of settings and seeds, one thread a run, and compares how soon the models read and where they end.

A grid is a YAML file of plain values:

    data: data/digits.py --pictures 40000     # a script of this repository, run once with --out for the pictures
    recipe: recipes/quickstart.yaml           # of all runs
    settings:                                 # of all runs, as on the command line of `fuyu-e2e fit`
      data.train: "{data}/train-[0-9]*.tar"   # {data} is the folder of the pictures
      trainer.max_steps: 1300
      trainer.val_check_interval: 25
    contenders:                               # each with settings of its own; the first is what others are compared to
      default: {}
      rows and columns: {model.decoder.grid_embeddings: 32}

All contenders train for as many operations as the first: the steps of the others, and the steps between their
validations, follow from what their first rows cost, unless they set `trainer.max_steps` themselves, as those must
whose data are others.
"""

import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import yaml

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.studies.curve import CURVE
from fuyu_e2e.studies.grid_report import compare, draw, print_table
from fuyu_e2e.training.settings.recipe import RecipeReader

RECORDER = "fuyu_e2e.studies.curve"
"""The module of the callback that records a run's curve."""
CHEAPER = {"trainer.logger": False, "checkpoint.save_top_k": 0}
"""Settings of all runs by which a validation costs little: no samples are generated, and nothing is saved."""
LENGTHS = ("trainer.max_steps", "trainer.val_check_interval")
"""Settings in steps, which are longer for contenders with cheaper steps."""
SAMPLED_ROWS = 64
"""Rows from which the operations of a step are estimated."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a study."""

    data: str
    """The script that writes the pictures, with its options."""
    recipe: str
    settings: Mapping[str, Any]
    """Settings of all runs."""
    contenders: Mapping[str, Mapping[str, Any]]
    """Further settings by the contender's name."""

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Reads a grid's file.

        Raises:
            UserError: The file can't be read, or isn't a grid.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"The grid {path} can't be read: {' '.join(str(error).split())}.") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            raise UserError(f"The grid {path} must hold exactly {', '.join(names)}.")
        contenders = content["contenders"]
        if not isinstance(contenders, dict) or not all(isinstance(own, dict) for own in contenders.values()):
            raise UserError(f"The grid {path}: contenders must be names, each with its settings or {{}}.")
        return cls(**content)

    def settings_of(self, contender: str, data: Path) -> dict[str, Any]:
        """Returns all settings of a contender's runs, with the steps that cost as much as the first contender's.

        Raises:
            UserError: A setting is wrong, or the recipe or the pictures can't be read.
        """
        own = {**self.settings, **self.contenders[contender]}
        reference = next(iter(self.contenders))
        if contender == reference or "trainer.max_steps" in self.contenders[contender]:
            return own
        ratio = self._operations_of_a_step(reference, data) / self._operations_of_a_step(contender, data)
        lengths = {name: max(1, round(self.settings[name] * ratio)) for name in LENGTHS if name in self.settings}
        return own | lengths

    def _operations_of_a_step(self, contender: str, data: Path) -> float:
        settings = {**self.settings, **self.contenders[contender]}
        return operations_of_a_step(self.recipe, tuple(as_options(settings, data)))


@cache  # all contenders are compared to the first
def operations_of_a_step(recipe: str, options: tuple[str, ...]) -> float:
    """Returns the mean training operations of the first steps of a shipped recipe with options of the command line.

    Those of blocks that are annealed are the mean over a run.

    Raises:
        UserError: A setting is wrong, or the recipe or the pictures can't be read.
    """
    run = RecipeReader(["--config", str(shipped(recipe)), *options], lambda _: None)
    rows = [row.batch for row in islice(run.datamodule.stream("train").rows(), SAMPLED_ROWS)]
    each = fmean(batch_cost(run.model.config, row, done=None).training_flops for row in rows)
    return each * (run.config.rows_per_step or run.config.trainer.accumulate_grad_batches)


def as_options(settings: Mapping[str, Any], data: Path) -> list[str]:
    """Returns settings as options of the command line, with the folder of the pictures in place of `{data}`."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [f"--{name}={text.replace('{data}', str(data))}" for name, text in texts.items()]


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    contender: str
    seed: int
    settings: Mapping[str, Any]

    def is_known(self, result: Mapping[str, Any]) -> bool:
        """Returns whether a recorded result is of this run."""
        known = (result["contender"], result["seed"], result["settings"])
        return known == (self.contender, self.seed, self.settings)


def grid(args: Sequence[str]) -> None:
    """Trains every contender of a grid with every seed; draws how soon each reads, and prints where each ends."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies grid", description=grid.__doc__)
    parser.add_argument("file", type=Path, help="The grid, such as recipes/studies/plateau.yaml.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Default: 0 to 4.")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="By default all of the grid.")
    parser.add_argument("--runs", type=Path, help="Folder of pictures and runs (default: runs/NAME OF THE GRID).")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Runs at once (default: all cores).")
    parser.add_argument(
        "--out",
        type=Path,
        help="Results as JSON, with a picture and a line for each run in a .jsonl next to it; runs recorded there "
        "aren't repeated (default: bench-NAME OF THE GRID.json).",
    )
    options = parser.parse_args(args)
    plan = Grid.read(options.file)
    chosen = options.contenders or list(plan.contenders)
    if strange := [name for name in chosen if name not in plan.contenders]:
        raise UserError(f"{options.file} has no contender {strange[0]!r}, but {', '.join(plan.contenders)}.")
    folder = options.runs or Path("runs") / options.file.stem
    out = options.out or Path(f"bench-{options.file.stem}.json")
    data = write_data(plan.data, folder / "data")
    settings = {name: plan.settings_of(name, data) for name in chosen}
    wanted = [Run(name, seed, settings[name]) for seed in options.seeds for name in chosen]
    results = Results(out.with_suffix(".jsonl"))
    train = partial(_train, plan.recipe, data, folder, results)
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(train, [run for run in wanted if results.of(run) is None]))
    found = [result for run in wanted if (result := results.of(run)) is not None]
    compared = compare(found)
    write_json(out, {**environment("cpu"), "grid": options.file.stem, "compared": compared})
    print_table(compared)
    draw_picture(out.with_suffix(".png"), 2, partial(draw, found))


class Results:
    """The results of completed runs: a line of JSON for each, written as soon as the run ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, run: Run) -> dict[str, Any] | None:
        """Returns the result of a run, or None."""
        return next((result for result in self._known if run.is_known(result)), None)

    def add(self, run: Run, curve: Sequence[Mapping[str, int | float]]) -> None:
        """Records a completed run."""
        result = {"contender": run.contender, "seed": run.seed, "settings": dict(run.settings), "curve": curve}
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(result) + "\n")
            self._known.append(result)


def write_data(script: str, folder: Path) -> Path:
    """Runs the script that writes the pictures, unless the folder is there; returns the folder.

    Raises:
        UserError: The script failed.
    """
    if not folder.exists():
        name, *options = shlex.split(script)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        command = [sys.executable, str(shipped(name)), "--out", str(unfinished), *options]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{script} failed: see its message above.")
        unfinished.rename(folder)
    return folder


def _train(recipe: str, data: Path, folder: Path, results: Results, run: Run) -> None:
    """Trains or resumes one run with one thread, and records its curve.

    Raises:
        UserError: Training failed; names its log.
    """
    place = folder / f"{run.contender}-{run.seed}".replace(" ", "-")
    _claim(place, run)
    settings = {
        **CHEAPER,
        **run.settings,
        "seed_everything": run.seed,
        "trainer.default_root_dir": str(place),
        "trainer.callbacks+": f"{RECORDER}.Curve",
        "ckpt_path": "last",
    }
    command = [
        sys.executable,
        "-m",
        "fuyu_e2e",
        "fit",
        "--allow-imports",
        RECORDER,
        "--config",
        str(shipped(recipe)),
        *as_options(settings, data),
    ]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = place / "log.txt"
    if not (place / CURVE).exists():
        with log.open("a") as file:
            code = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        if code:
            raise UserError(f"{run.contender}, seed {run.seed}, ended with code {code}: see {log}.")
    results.add(run, json.loads((place / CURVE).read_text()))
    print(f"{run.contender}, seed {run.seed}: done", flush=True)


def _claim(place: Path, run: Run) -> None:
    """Makes the directory of a run, or checks that the one that is there holds the same run.

    Raises:
        UserError: It holds a run with other settings.
    """
    place.mkdir(parents=True, exist_ok=True)
    described, own = place / "settings.json", json.dumps(dict(run.settings), indent=1)
    if described.exists() and described.read_text() != own:
        raise UserError(f"{place} holds a run with other settings: remove it, or name another folder with --runs.")
    described.write_text(own)
