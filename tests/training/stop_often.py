"""Stops trainings on two processes by SIGTERM at random moments, many times, and says how each one left and went on.

    OMP_NUM_THREADS=1 python tests/training/stop_often.py [TIMES]

For rank 0, rank 1 and both, TIMES runs each (10): the exit codes, the seconds from the signal to the last exit, and
whether weights, optimizer state and losses of the resumed run are bitwise those of an uninterrupted one.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from guarded_runs import launch
from resumed_runs import ROWS_PER_STEP, STEPS, prepare

CASES = {"rank 0": [0], "rank 1": [1], "both": [0, 1]}


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank of a run saw."""
    return [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(2)]


def goes_on(folder: Path, name: str) -> bool:
    """Whether the run resumed is the uninterrupted one from there on."""
    stopped_at = len(seen(folder, name)[0]["losses"])
    return all(
        resumed[part] == whole[part][stopped_at:]
        for part in ("after_step", "losses")
        for resumed, whole in zip(seen(folder, f"{name} resumed"), seen(folder, "whole"), strict=True)
    )


def main(times: int) -> None:
    """Runs all and prints a table."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder, lost = Path(place), 0
        prepare(folder)
        launch(folder, {"name": "whole"})
        print(f"{'SIGTERM to':12} {'exit codes':24} {'slowest':>8} {'resumed bitwise':>16}")
        for case, ranks in CASES.items():
            left, bitwise = [], 0
            for time in range(times):
                name, row = f"{case} {time}", rng.randrange((STEPS - 1) * ROWS_PER_STEP // 2)
                left.append(launch(folder, {"name": name, "signal": "SIGTERM", "ranks": ranks, "row": row}))
                launch(folder, {"name": f"{name} resumed", "resume": name})
                bitwise += goes_on(folder, name)
            codes = {str(one["codes"]): sum(one["codes"] == other["codes"] for other in left) for one in left}
            told = ", ".join(f"{code} x {count}" for code, count in codes.items())
            slowest = max(one["seconds"] for one in left)
            print(f"{case:12} {told:24} {slowest:6.1f} s {bitwise:8} of {times}", flush=True)
            lost += times - bitwise
    sys.exit(lost > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
