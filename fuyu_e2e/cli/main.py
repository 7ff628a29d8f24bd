"""Finds and runs a command: Lightning's `fit`, `validate`, `test` and `predict`, and the project's own.

Nothing heavy is imported here; a command's module is imported once the command is known.
"""

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pkgutil import resolve_name

from fuyu_e2e.data.home import words_with_home
from fuyu_e2e.errors import WRONG_USE, UserError, of_signal
from fuyu_e2e.training.settings.arguments import did_you_mean
from fuyu_e2e.training.settings.environment import set_defaults
from fuyu_e2e.training.settings.setting_errors import reason
from fuyu_e2e.version import __version__

USAGE = f"""fuyu-e2e {__version__}: train a multimodal decoder with no vision encoder, from scratch.

usage: fuyu-e2e COMMAND [--help]

  quickstart         train a small model on handwritten digits, score it, show what it reads
  fit                train:       fuyu-e2e fit --config recipes/X.yaml [--data.train 'PATTERN'] [--ckpt_path last]
  validate, test     loss and perplexity of a checkpoint on data.val or data.test
  predict            continue the documents of data.predict, into predictions.jsonl of the run's directory
  evaluate           score a checkpoint on a task, and whether it looks:  fuyu-e2e evaluate --checkpoint C --task T
  generate           continue prompts:  fuyu-e2e generate --checkpoint C --image a.png --prompt "..."
  routing            show how much depth each token of a prompt gets in a model with routed blocks
  checkpoint         verify, info, consolidate: check a checkpoint, describe it, or write it as one file
  export             write a trained model for fuyu_e2e.load, or --to transformers for FuyuForCausalLM
  import             turn a FuyuForCausalLM folder into a model for generate, fit and export
  tokenizer train    train a tokenizer on the text of shards
  shards             index, verify, stats or write: what shards hold, and new ones from your own files
  inspect            show a sample as it enters the model
  estimate           memory, operations and hours of a recipe's run, before it is started
"""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_WAY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors of the system for a place that this user may not use, or that isn't one."""
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {
    **dict.fromkeys(LIGHTNING_COMMANDS, "fuyu_e2e.cli.lightning:lightning"),
    "inspect": "fuyu_e2e.cli.inspect:inspect",
    "estimate": "fuyu_e2e.cli.estimate:estimate",
    "checkpoint": "fuyu_e2e.cli.checkpoint:checkpoint",
    "export": "fuyu_e2e.cli.export:export",
    "import": "fuyu_e2e.cli.export:import_model",
    "evaluate": "fuyu_e2e.cli.evaluate:evaluate",
    "generate": "fuyu_e2e.cli.generate:generate",
    "routing": "fuyu_e2e.cli.routing:routing",
    "shards": "fuyu_e2e.cli.shards:shards",
    "tokenizer": "fuyu_e2e.cli.tokenizer:tokenizer",
    "quickstart": "fuyu_e2e.cli.quickstart:quickstart",
}
"""For each command, a function that takes its arguments (Lightning's commands also take the name first) and returns
the exit code."""


def main() -> int:
    """Runs one command; an error that the user can fix ends with a sentence and its exit code instead of a
    traceback."""
    set_defaults()
    name, *args = words_with_home(sys.argv[1:]) or ["--help"]
    if name == "--version":
        print(f"fuyu-e2e {__version__}")
        return 0
    if name in ("--help", "-h"):
        print(USAGE)
        return 0
    try:
        return _command(name)([name, *args] if name in LIGHTNING_COMMANDS else args)
    except KeyboardInterrupt:
        print("\nfuyu-e2e: interrupted.", file=sys.stderr)
        return of_signal(signal.SIGINT)
    except UserError as error:
        # An error of a loader's worker arrives as a traceback in text, with our sentence in its last line.
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        print(f"fuyu-e2e: {sentence}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__.partition(".")[0]:
            raise
        print(f"fuyu-e2e: A package is missing: {reason(str(error))}.", file=sys.stderr)
        return WRONG_USE
    except OSError as error:
        where = f" for {error.filename}" if error.filename else ""
        if error.errno in NO_ROOM:
            sentence = f"The disk has no room left{where}: make room on it, and run the command again."
        elif error.errno in NO_WAY and error.filename:
            sentence = f"{error.filename} can't be read or written ({error.strerror}): name another place."
        else:
            raise
        print(f"fuyu-e2e: {sentence}", file=sys.stderr)
        return WRONG_USE


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """Imports a command and returns its function.

    Raises:
        UserError: There is no command of that name.
    """
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "fuyu-e2e --help lists all commands."
        raise UserError(f"There is no command {name!r}: {hint}")
    _silence_what_no_user_can_act_on()
    command: Callable[[Sequence[str]], int] = resolve_name(COMMANDS[name])
    return command


def _silence_what_no_user_can_act_on() -> None:
    """Silences a product's advertisement, and Lightning's warnings about normal conditions."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # A resumed run, and one without validation.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
    # Rows have no batch sampler, and WritePredictions needs no indices.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
