"""The exercises of the course: each change applies to the code as it is, and the test that the page
names for it fails with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

pytestmark = pytest.mark.tools
PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
EXERCISES = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
NOT_COPIED = (".*", "runs", "build", "dist", "__pycache__", "*.egg-info")


def change(exercise: str) -> str:
    """The exercise's diff."""
    [found] = re.findall(r"^```diff\n(.*?)^```", exercise, re.M | re.S)
    return found


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the checkout."""
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))


@pytest.mark.parametrize("title", EXERCISES)
def test_the_test_that_is_named_fails_with_the_change(title, tree):
    exercise = EXERCISES[title]
    [(file, name)] = re.findall(r"Caught by `(tests/\w+\.py)::(\w+)`", exercise)
    # a checkout around the temporary folder is not to be looked for
    env = os.environ | {"PYTHONPATH": str(tree), "GIT_CEILING_DIRECTORIES": str(tree.parent)}

    def run(*command: str, given: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=tree, env=env, input=given, capture_output=True, text=True
        )

    applied = run("git", "apply", "-", given=change(exercise))
    assert applied.returncode == 0, applied.stderr
    tested = run(sys.executable, "-m", "pytest", "-q", f"{file}::{name}")
    assert tested.returncode == 1 and f"FAILED {file}::{name}" in tested.stdout, tested.stdout


@pytest.mark.parametrize("title", EXERCISES)
def test_a_change_is_of_five_lines(title):
    lines = change(EXERCISES[title]).splitlines()
    assert sum(re.match(r"\+(?!\+\+)", line) is not None for line in lines) <= 5


def test_there_are_six_with_their_answers_folded():
    assert len(EXERCISES) == 6
    for exercise in EXERCISES.values():
        assert exercise.count("<details>") == exercise.count("</details>") == 1
