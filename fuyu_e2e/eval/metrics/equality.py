"""Metrics of whether an answer equals a reference."""

from collections.abc import Sequence


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Returns 1 for an answer that equals a reference letter for letter (exact match of SQuAD, Rajpurkar et al. 2016,
    section 6.1, without its normalisation), else 0."""
    return float(answer in references)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns 1 for an answer that equals a reference except for case and surrounding spaces, else 0."""
    return float(answer.strip().casefold() in {reference.strip().casefold() for reference in references})
