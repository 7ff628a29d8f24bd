"""Readers of public formats of questions, by name."""

from collections.abc import Callable, Iterator

from fuyu_e2e.eval.question import Question

READERS: dict[str, Callable[..., Iterator[Question]]] = {}
