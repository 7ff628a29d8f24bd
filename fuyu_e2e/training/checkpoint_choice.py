"""Chooses the checkpoint that a Lightning command reads."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.checkpoint.atomic import UNFINISHED, CheckpointManifest, is_whole
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.metadata import ModelMetadata
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint, manifests, run_checkpoints
from fuyu_e2e.checkpoint.run_directory import CHECKPOINTS, shown
from fuyu_e2e.errors import UserError


def checkpoint_to_read(command: str, named: str | None, run: Path) -> str | None:
    """Returns the checkpoint for a Lightning command to read.

    `last` names the newest intact checkpoint of the run, `best` the one with the best figure, a directory the newest
    in it. Reads the checkpoint once before Lightning does, since Lightning's errors are tracebacks.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        named: `--ckpt_path`.
        run: The run's directory.

    Returns:
        The path, or None if `fit` starts at step 0.

    Raises:
        UserError: The checkpoint can't be read; there is none, so that the command would evaluate random weights; or
            `fit` would mix another run's files with those in the directory.
    """
    found = run_checkpoints(run)
    if named == "last":
        if found:
            return str(run.absolute())
        _begin_instead(command, run)
        return None
    if not named:
        if command == "fit" and (found or _without_manifest(run)):
            raise UserError(
                f"{run} already holds a run: continue it with --ckpt_path last, or name another directory with "
                "--trainer.default_root_dir."
            )
        if command == "fit":
            return None
        raise UserError(
            f"No checkpoint is named to {command}: say --ckpt_path last for the newest of {run}, or --ckpt_path "
            "CHECKPOINT for another."
        )
    path = _best(run) if named == "best" else Path(named)
    if not path.is_file() and not is_whole(path) and not run_checkpoints(path):
        raise UserError(
            f"--ckpt_path {named} is no checkpoint on this machine, and no directory that holds one; `last` continues "
            "the run of trainer.default_root_dir."
        )
    path = find_checkpoint(path)
    ModelMetadata.of(read_checkpoint(path), str(path))
    if command == "fit":
        _check_own(path, run, found)
    return str(path.absolute())  # Lightning takes what begins with http for a URL


def _begin_instead(command: str, run: Path) -> None:
    """Logs that a run starts at step 0, if `fit` should continue from the last checkpoint and there is none.

    Raises:
        UserError: There is a checkpoint of unknown age; or the command needs one.
    """
    if other := _without_manifest(run):
        raise UserError(f"{other} has no manifest, and no other checkpoint there has: name one with --ckpt_path.")
    if command != "fit":
        raise UserError(
            f"There is no checkpoint in {run / CHECKPOINTS} to {command}: name one with --ckpt_path, or the directory "
            "of a run that has one with --trainer.default_root_dir."
        )
    rank_zero_info(f"No checkpoint in {run / CHECKPOINTS}: the run begins at step 0.")


def _without_manifest(run: Path) -> Path | None:
    """Returns a checkpoint of the run that Lightning alone wrote, if there is one."""
    found = (path for path in (run / CHECKPOINTS).glob("*.ckpt") if not path.name.startswith(UNFINISHED))
    return next(found, None)


def _best(run: Path) -> Path:
    if (best := best_checkpoint(run)) is None:
        raise UserError(
            f"--ckpt_path best: no checkpoint of {run} records a figure that tells the best; `last` is the newest."
        )
    rank_zero_info(f"The best checkpoint of {run} by {best.name} ({best.value:.6g}): {shown(best.path)}")
    return best.path


def _check_own(path: Path, run: Path, found: list[Path]) -> None:
    """Logs what becomes of later checkpoints when a run returns to an earlier one.

    Raises:
        UserError: The run has checkpoints, and `path` is not among them.
    """
    if not found:
        return
    if path.resolve() not in {own.resolve() for own in found}:
        raise UserError(
            f"{run} already holds a run, and {path} is a checkpoint of another: name a new directory with "
            "--trainer.default_root_dir."
        )
    step, later = CheckpointManifest.read(path).step, max(manifest.step for manifest in manifests(found).values())
    if step < later:
        rank_zero_info(
            f"Going back to step {step}: checkpoints of later steps, up to {later}, stay, and count among the best: "
            "remove those that are not to."
        )
