"""Random tests try the same examples each time, and 50 times as many new ones under `--hypothesis-profile=explore`."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PROFILES = {name: settings.get_profile(name) for name in ("suite", "explore")}


def drawn(profile: settings) -> list[tuple[int, str]]:
    examples = []

    @settings(profile, phases=[Phase.generate])
    @given(number=st.integers(), text=st.text(max_size=9))
    def test(number: int, text: str) -> None:
        examples.append((number, text))

    test()
    return examples


@pytest.mark.skipif(not settings.default.derandomize, reason="the exploring profile draws new examples")
def test_examples_are_the_same_whatever_was_imported_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = settings(PROFILES["suite"], max_examples=400)
    before = drawn(many)
    (tmp_path / "constants_of_ours.py").write_text(f"NUMBERS = {list(range(70_000, 70_400))}\nWORD = 'seldom seen'\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("constants_of_ours")
    try:
        assert drawn(many) == before
    finally:
        del sys.modules["constants_of_ours"]


def test_a_run_explores_only_where_it_is_asked_to(pytestconfig: pytest.Config) -> None:
    asked = pytestconfig.getoption("hypothesis_profile") or "suite"
    assert settings.get_current_profile_name() == asked
    assert [name for name, profile in PROFILES.items() if profile.derandomize] == ["suite"]


def test_the_exploring_profile_draws_new_examples_and_fifty_times_as_many() -> None:
    first, second = (drawn(settings(PROFILES["explore"], max_examples=100)) for _ in range(2))
    assert first != second
    assert PROFILES["explore"].max_examples == 50 * PROFILES["suite"].max_examples


def test_each_random_test_takes_its_number_of_examples_from_the_profile(repository: Path) -> None:
    fixed = [
        path
        for path in (repository / "tests").rglob("test_*.py")
        if re.search(r"max_examples=\d\d?\)", path.read_text())
    ]
    assert not fixed, "settings.default.max_examples // 2, say, grows with the profile"
