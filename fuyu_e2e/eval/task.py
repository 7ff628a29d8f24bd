"""A task: questions of a public format or of shards, how a model answers them, and the metrics of the answers.

A task is a small YAML file of plain values, and never code:

    format: docvqa                        # a reader of `fuyu_e2e.eval.formats`, or shards
    data:                                 # its files and folders, relative to the task file
      annotations: val_v1.0.json
      images: .
    prompt: "{question}"                  # for formats with questions; shards have whole prompts
    answer: generate                      # or choose, or perplexity
    max_new_tokens: 32
    metrics: [anls, accuracy]
    groups: [question_type]               # also reports scores by these
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fuyu_e2e.data.home import with_home
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.locations import is_local
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.formats import READERS as PUBLIC_READERS
from fuyu_e2e.eval.metrics import METRICS
from fuyu_e2e.eval.question import Question
from fuyu_e2e.eval.shard_questions import read_shards

AnswerKind = Literal["generate", "choose", "perplexity"]
READERS: dict[str, Callable[..., Iterator[Question]]] = {**PUBLIC_READERS, "shards": read_shards}
"""The reader of each format."""
BATCH_TOKENS = 16_384
"""Default number of tokens that a model reads and writes at once."""
FOLDER = "recipes/tasks"
"""The folder of shipped tasks."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of a task, and how answers are scored.

    Raises:
        UserError: A value is wrong; says which.
    """

    name: str
    """Name in results and on curves."""
    format: str
    data: Mapping[str, str] = field(default_factory=dict)
    """Files and folders for the format's reader, by its parameter names."""
    prompt: str | None = None
    """The text after the image, with `{question}` in it; None takes the reader's default."""
    answer: AnswerKind = "generate"
    """`generate` generates the answer, `choose` takes the likeliest of the question's choices, and `perplexity` has no
    answers: it measures the likelihood of the documents."""
    max_new_tokens: int = 64
    """Most tokens of a generated answer."""
    metrics: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in READERS:
            raise UserError(f"format is {self.format!r}, but must be one of {', '.join(READERS)}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if self.answer == "perplexity" and self.metrics:
            raise UserError("metrics score answers, which perplexity has none of: leave them out")
        if self.answer != "perplexity" and not self.metrics:
            raise UserError(f"metrics names none of {', '.join(METRICS)}")
        if strange := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"metrics names {strange[0]!r}, which is none of {', '.join(METRICS)}")
        if self.prompt is not None and "prompt" not in self._takes:
            raise UserError(f"prompt has no place in {self.format}, which hold whole prompts: leave it out")
        if strange := [name for name in self.data if name not in self._files]:
            raise UserError(f"data names {strange[0]!r}, but {self.format} takes {', '.join(self._files)}")
        missing = [
            name for name, taken in self._files.items() if taken.default is taken.empty and name not in self.data
        ]
        if missing:
            raise UserError(f"data.{missing[0]} is not set: say --data {missing[0]}=PATH, or set it there")

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(READERS[self.format]).parameters

    @property
    def _files(self) -> dict[str, inspect.Parameter]:
        return {name: taken for name, taken in self._takes.items() if name not in ("prompt", "stats", "whole")}

    def questions(self, stats: SampleStats) -> Iterator[Question]:
        """Returns all questions, in stored order; counts samples that aren't questions in `stats`.

        Raises:
            UserError: A file is missing or has another format.
        """
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        # The likelihood of whole documents, in which each token counts once.
        whole = {"whole": True} if self.answer == "perplexity" and "whole" in self._takes else {}
        return READERS[self.format](**self.data, **prompt, **whole, stats=stats)


def load_task(named: str, data: Mapping[str, str] | None = None) -> Task:
    """Reads a task file.

    Args:
        named: Path of a task file, or the name of a shipped task.
        data: Files and folders that replace the task's own, relative to the working directory.

    Raises:
        UserError: There is no such file, or it isn't a task; names the file.
    """
    path = Path(named)
    if not path.is_file():
        try:
            path = shipped(f"{FOLDER}/{named}.yaml")
        except UserError:
            names = ", ".join(sorted(file.stem for file in shipped(FOLDER).glob("*.yaml")))
            raise UserError(f"The task {named} is no file, and none of the shipped ones ({names}).") from None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Task(name=path.stem, **_checked(settings, path.parent, data or {}))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The task {path} can't be read: {' '.join(str(error).split())}.") from error
    except UserError as error:
        raise UserError(f"The task {path}: {error}.") from None


def _checked(settings: Any, folder: Path, data: Mapping[str, str]) -> dict[str, Any]:
    """Returns a file's settings in the types of a task, with data paths relative to the file."""
    kinds = {"data": dict, "max_new_tokens": int, "metrics": list, "groups": list}
    known = [entry.name for entry in fields(Task) if entry.name != "name"]
    if not isinstance(settings, dict) or "format" not in settings:
        raise UserError(f"it has no format, which is one of {', '.join(READERS)}")
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{name!r} is no setting of a task, which are {', '.join(known)}")
        kind = kinds.get(name, str)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) is not kind or not all(isinstance(entry, str) for entry in inner):
            raise UserError(f"{name} is {value!r}, but must be {_called(kind)}")
    if (answer := settings.get("answer", "generate")) not in get_args(AnswerKind):
        raise UserError(f"answer is {answer!r}, but must be one of {', '.join(get_args(AnswerKind))}")
    named = with_home(settings.get("data", {}))
    own = {name: str(folder / path) if is_local(path) else path for name, path in named.items()}
    lists = {name: tuple(settings[name]) for name in ("metrics", "groups") if name in settings}
    return settings | lists | {"data": {**own, **data}}


def _called(kind: type) -> str:
    return {dict: "names with a path each", list: "a list of names", int: "a whole number", str: "text"}[kind]
