"""Every relative link of README and the pages leads to a file, and every anchor to a heading of it."""

import re
from pathlib import Path

import pytest

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
PAGES = ["README.md", "docs/*.md", "data/*/README.md"]


def prose(page: Path) -> str:
    """The page without its code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            found.append(target)
    return found


@pytest.mark.parametrize("pages", PAGES)
def test_every_relative_link_and_anchor_exists(pages: str, repository: Path) -> None:
    paths = sorted(repository.glob(pages))
    assert paths
    assert {path.name: broken(path) for path in paths if broken(path)} == {}


def test_a_link_to_a_missing_page_or_heading_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page, of two\n[a](#a-page-of-two) [b](#b) [c](no.md) [d](page.md#a-page-of-two)\n")
    assert broken(page) == ["#b", "no.md"]


def test_every_page_is_linked_from_the_readme(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    assert [page.name for page in repository.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []
