"""`~` is the home folder wherever a path is named, and a tilde elsewhere is a tilde."""

from argparse import Namespace

import jsonargparse
import pytest

from fuyu_e2e.data.home import with_home, words_with_home


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("~", "/home/ada"),
        ("~/shards/*.tar", "/home/ada/shards/*.tar"),
        ("--out=~/run", "--out=/home/ada/run"),
        ("--data.train+=~/a=b.tar", "--data.train+=/home/ada/a=b.tar"),
        ("images=~/val", "images=/home/ada/val"),
        ("--data=images=~/val", "--data=images=/home/ada/val"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("a~/x", "a~/x"),
        ("pipe:cat ~/x", "pipe:cat ~/x"),
        ("--prompt=~/x", "--prompt=~/x"),
    ],
)
def test_words_begin_at_home_where_a_path_begins(said: str, meant: str) -> None:
    assert words_with_home(["fit", said]) == ["fit", meant]


def test_a_prompt_is_no_path() -> None:
    assert words_with_home(["--prompt", "~/x", "--out", "~/x"]) == ["--prompt", "~/x", "--out", "/home/ada/x"]


def test_all_that_a_setting_holds_begins_at_home() -> None:
    source = jsonargparse.Namespace(shards=["~/b.tar"], weight=1.0)
    held = {"one": ("~/a", 3), "sources": source, "none": None, "cache": "~/.cache"}
    assert with_home(held, but=["~/.cache"]) == {
        "one": ("/home/ada/a", 3),
        "sources": jsonargparse.Namespace(shards=["/home/ada/b.tar"], weight=1.0),
        "none": None,
        "cache": "~/.cache",
    }
    assert with_home(Namespace(a="~")) == Namespace(a="/home/ada")
