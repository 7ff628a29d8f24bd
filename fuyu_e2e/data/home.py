"""Expands `~` at the start of a path that a user names to the home folder.

A shell expands it only at the start of an unquoted word: not in '~/shards/*.tar', whose quotes keep the star for us,
nor in --out=~/run, nor in a recipe. So commands expand it themselves, all in the same way: in the words of a command
line before anything reads them, and in the settings of a recipe as soon as they are read.
"""

import argparse
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

TEXT_OPTIONS = ("--prompt",)
"""Options that take a text, which may start with any character."""


def words_with_home(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with `~` expanded, also after `--option=` and `KEY=`."""
    return [
        word if before in TEXT_OPTIONS else _word_with_home(word)
        for before, word in zip(["", *words], words, strict=False)
    ]


def _word_with_home(word: str) -> str:
    named = re.fullmatch(r"((?:[\w.+-]+=)*)(~.*)", word, re.DOTALL)
    if named is None or named[1].partition("=")[0] in TEXT_OPTIONS:
        return word
    return named[1] + with_home(named[2])


def with_home(setting: Any, but: Collection[str] = ()) -> Any:
    """Returns a setting with `~` expanded; in lists, dicts and namespaces, in all values. Changes namespaces in place.

    Args:
        setting: Any value of a recipe.
        but: Texts to leave as they are.
    """
    if isinstance(setting, str):
        # Path's own method raises if there is no such user, but a file's name may start that way.
        return setting if setting in but else os.path.expanduser(setting)  # noqa: PTH111
    if isinstance(setting, list | tuple):
        return type(setting)(with_home(each, but) for each in setting)
    if isinstance(setting, dict):
        return {name: with_home(each, but) for name, each in setting.items()}
    if isinstance(setting, argparse.Namespace):  # jsonargparse's, too
        vars(setting).update({name: with_home(each, but) for name, each in vars(setting).items()})
    return setting
