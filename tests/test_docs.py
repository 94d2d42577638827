"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def test_every_test_that_the_reliability_page_names_exists():
    page, name = (ROOT / "docs" / "reliability.md").read_text(), ""
    named = re.findall(r"(test_\w+\.py)|::(test_\w+)", page)
    assert len(named) > 100
    for file, test in named:
        name = file or name
        source = (ROOT / "tests" / name).read_text()
        assert not test or re.search(rf"^def {test}\(", source, re.M), f"{name}::{test}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_map_has_every_file():
    """The core's in the README, a wing's in its __init__.py."""
    package, page = ROOT / "zephyr", (ROOT / "README.md").read_text()
    page = page[page.index("## The code, in reading order") :]
    assert [p.name for p in package.glob("[!_]*.py") if p.name not in page] == []
    for wing in (p.parent for p in package.glob("*/__init__.py")):
        assert f"zephyr/{wing.name}/" in page
        about = (wing / "__init__.py").read_text()
        assert [p.name for p in wing.glob("[!_]*.py") if p.name not in about] == [], wing.name


def test_the_front_page_is_short():
    front = (ROOT / "README.md").read_text().partition("## Where to go")[0]
    assert len(front.split()) <= 1200
