"""`~` at the beginning of a path that a user names, which stands for the home folder.

A shell puts it there only where a word begins with it, unquoted: not in '~/shards/*.tar', whose quotes leave the star
to us, nor in --out=~/run, nor in a recipe. So commands do it themselves, all in one way: with the words of a command
line before anything looks at them, and with the settings of a recipe as soon as they are read.
"""

import argparse
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

TEXT_OPTIONS = ("--prompt",)
"""Options that take a text, which may begin as it likes."""


def words_with_home(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with the home folder in place of `~`, also behind `--option=` and `KEY=`."""
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
    """Returns a setting with the home folder in place of `~`; of several, in all that they hold, namespaces where they
    are.

    Args:
        setting: Anything that a recipe may hold.
        but: Texts that stay as they are.
    """
    if isinstance(setting, str):
        # Path's own raises where there is no such user, and a file's name may well begin so.
        return setting if setting in but else os.path.expanduser(setting)  # noqa: PTH111
    if isinstance(setting, list | tuple):
        return type(setting)(with_home(each, but) for each in setting)
    if isinstance(setting, dict):
        return {name: with_home(each, but) for name, each in setting.items()}
    if isinstance(setting, argparse.Namespace):  # jsonargparse's, too
        vars(setting).update({name: with_home(each, but) for name, each in vars(setting).items()})
    return setting
