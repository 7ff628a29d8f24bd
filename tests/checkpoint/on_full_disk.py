"""Fills a disk of 64 MB by training on it, and goes on once there is room.

    unshare -m python on_full_disk.py FOLDER        (as a user: unshare -Urm)

FOLDER/disk becomes the disk, in this process's own mount namespace. FOLDER/told.json says what the commands left.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, MORE_STEPS, FILLED_BEHIND = 12, 14, 9


class Ballast(Callback):
    """Takes what room is left late in the run, so that its curves have none either."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= FILLED_BEHIND:
            with (Path(trainer.default_root_dir).parent / "ballast").open("ab", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break


def main(folder: Path) -> None:
    from fuyu_e2e.cli import main as fuyu_e2e  # so that Ballast alone costs little to import
    from fuyu_e2e.studies.quickstart import Workplace, write_data

    place, disk = Workplace(folder), folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    write_data(place.data, seed=0, pictures=100, test_pictures=1)
    told: dict[str, Any] = {}

    def call(name: str, *args: Any) -> None:
        sys.argv = ["fuyu-e2e", *map(str, args)]
        told[name] = fuyu_e2e()

    fit = ["fit", f"--config={Path(__file__).with_name('full_disk.yaml')}", f"--data.tokenizer={place.tokenizer}"]
    fit += [f"--data.train={place.pattern('train')}", f"--trainer.default_root_dir={disk / 'run'}"]
    fit += ["--trainer.max_steps", str(STEPS)]
    call("fit", *fit, "--allow-imports", "on_full_disk", "--trainer.callbacks", "on_full_disk.Ballast")
    told["checkpoints"] = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    call("verify", "checkpoint", "verify", disk / "run")
    call("begin", *fit, f"--trainer.default_root_dir={disk / 'another'}")
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
    fit[-1] = str(MORE_STEPS)
    call("go on", *fit, "--ckpt_path", "last")
    call("verify all", "checkpoint", "verify", disk / "run")
    told["checkpoints in the end"] = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    curves = EventAccumulator(str(disk / "run" / "tensorboard"))
    curves.Reload()
    told["steps"] = [event.step + 1 for event in curves.Scalars("train/loss")]
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
