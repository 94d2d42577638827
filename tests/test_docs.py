"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_reliability_page_names_exists():
    page, name = (ROOT / "docs" / "reliability.md").read_text(), ""
    named = re.findall(r"(test_\w+\.py)|::(test_\w+)", page)
    assert len(named) > 100
    for file, test in named:
        name = file or name
        source = (ROOT / "tests" / name).read_text()
        assert not test or re.search(rf"^def {test}\(", source, re.M), f"{name}::{test}"


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_map_of_the_readme_has_every_module():
    page = (ROOT / "README.md").read_text()
    page = page[page.index("## The map") :]
    missing = [p.name for p in (ROOT / "zephyr").glob("[!_]*.py") if p.name not in page]
    assert missing == []
