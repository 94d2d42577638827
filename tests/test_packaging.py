"""What `make` installs: the pins in constraints.txt, setup.py's ranges, and what torch asks for."""

import ast
from importlib.metadata import requires, version

from packaging.requirements import Requirement

from helpers import ROOT

# Requires-Dist of the Linux wheels on PyPI; the wheel without CUDA asks for no Triton
TRITON_OF = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}


def pins() -> dict[str, str]:
    """The versions in constraints.txt, by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0]]
    return {r.name: str(r.specifier).removeprefix("==") for r in wanted}


def asked() -> list[Requirement]:
    """What setup.py asks for, in `make`'s extra too."""
    (call,) = [
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    words = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(words["extras_require"])
    return [Requirement(s) for s in ast.literal_eval(words["install_requires"]) + extras["test"]]


def test_every_requirement_has_a_pin_that_it_allows():
    versions = pins()
    assert {r.name for r in asked()} == versions.keys()
    assert [str(r) for r in asked() if not r.specifier.contains(versions[r.name])] == []


def test_triton_is_the_one_that_torch_asks_for():
    # pip refuses a pin that contradicts it, and then nothing installs where torch comes from PyPI
    assert pins()["triton"] == TRITON_OF[pins()["torch"]]
    installed = version("torch").partition("+")[0]
    asks = [Requirement(text) for text in requires("torch") if text.startswith("triton")]
    known = [r for r in asks if installed in TRITON_OF]
    assert all(str(r.specifier) == f"=={TRITON_OF[installed]}" for r in known)
