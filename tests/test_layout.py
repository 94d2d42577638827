"""The house: imports point one way, no file is in a circle, and what is to be read stays short."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the ground up: a file imports from floors below its own, or from its own floor
FLOORS = (
    "errors architecture",
    "files client endpoint attention distributed.machine distributed.signals",
    "config losses model packing weights.locate tokenizer",
    "weights",
    "distributed",
    "plan optim data",
    "run",
    "metrics feedback generate source collection collect evals.belief",
    "reference toy evals",
    "textbook explain __main__",
)


def modules() -> dict[str, Path]:
    """zephyr's modules by their name below the package: `run.guard`, `losses`."""
    found = {}
    for path in (ROOT / "zephyr").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "zephyr").with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules of zephyr that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    below = {name.removeprefix("zephyr.") for name in names if name.startswith("zephyr.")}
    files = {name for name, path in modules().items() if path.name != "__init__.py"}
    return frozenset(below & files)


def floor(module: str) -> int:
    """The floor of a module: that of its own name if one has it, else that of its wing."""
    wing, _, last = module.rpartition(".")
    for name in ("__main__" if last == "__main__" else module, wing):
        for k, names in enumerate(FLOORS):
            if name in names.split():
                return k
    raise AssertionError(f"zephyr/{module} has no floor")


def test_imports_point_one_way():
    for module, path in modules().items():
        for other in imported(path) - {module}:
            if path.name != "__init__.py":
                assert floor(other) <= floor(module), f"{module} imports {other}, which is above it"


def test_no_file_is_in_a_circle():
    left = {module: set(imported(path)) - {module} for module, path in modules().items()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"they import each other: {sorted(left)}"


def test_nothing_imports_a_script_and_a_wing_imports_nothing():
    """So that the planner, which needs no torch, may read a model's config.json."""
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & {"train_dpo", "train_sft", "demo"}, module
        if path.name == "__init__.py":
            assert len(tree.body) == 1 and ast.get_docstring(tree), f"{module}: a docstring alone"


def test_kernels_know_nothing_of_zephyr():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "zephyr" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("train_sft.py", 80),
        ("train_dpo.py", 80),
        ("zephyr/model.py", 130),
        ("zephyr/textbook.py", 100),
    ],
)
def test_what_is_read_first_is_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most
