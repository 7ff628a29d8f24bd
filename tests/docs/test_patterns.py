"""No command that is shown trains on the shards that `fuyu-e2e shards write` holds out to validate on."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest


@pytest.mark.parametrize("shown", ["README.md", "docs/*.md", "fuyu_e2e/**/*.py"])
def test_shown_patterns_leave_out_what_is_held_out(shown: str, repository: Path) -> None:
    named = re.compile(r"(?:--data\.train|tokenizer train --shards) '([^']+)'")
    patterns = [found for path in repository.glob(shown) for found in named.findall(path.read_text())]
    assert patterns
    assert [pattern for pattern in patterns if fnmatch(f"{Path(pattern).parent}/val-00000.tar", pattern)] == []
