"""The sources themselves: sizes, and what must not stand in them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "burnish").rglob("*.py"))
FILE_LINES = 400
FUNCTION_LINES = 60
LOOP_LINES = {"training.py": 80}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
LOADERS = {"torch.load", "torch.save", "np.load", "np.save", "numpy.load", "numpy.save"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def name_of(node: ast.expr) -> str:
    """`torch.load` of the expression that says so."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def sizes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The lines of every function, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                said = node.body[0]
                lines -= (said.end_lineno or 0) - said.lineno + 1
            yield node.name, lines


def banned(tree: ast.AST) -> Iterator[str]:
    """Everything in a file that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PICKLING:
                    yield f"line {node.lineno}: import of {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            module = node.module or ""
            if node.level:
                yield f"line {node.lineno}: relative import"
            if module == "__future__" and "annotations" in names:
                yield f"line {node.lineno}: it disables the shape checks"
            if module.split(".")[0] in PICKLING:
                yield f"line {node.lineno}: import of {module}"
            for name in names:
                if f"{module}.{name}" in LOADERS:
                    yield f"line {node.lineno}: import of {module}.{name}"
        elif isinstance(node, ast.Call) and name_of(node.func) in LOADERS | {"eval", "exec"}:
            yield f"line {node.lineno}: call of {name_of(node.func)}"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield f"line {node.value.lineno}: trust_remote_code"
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"line {node.lineno}: trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_source_is_small_and_clean(path: Path) -> None:
    """One file: its lines, its functions' lines, its name, its imports and calls."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = len(text.splitlines())
    assert lines <= FILE_LINES, f"{path.name} has {lines} lines: split it"
    limit = LOOP_LINES.get(path.name, FUNCTION_LINES)
    large = [f"{name} ({count} lines)" for name, count in sizes(tree) if count > limit]
    assert not large, f"{path.name} has large functions: {large}"
    assert not list(banned(tree)), f"{path.name}: {list(banned(tree))}"
    assert not VAGUE & set(path.stem.split("_")), f"{path.name} says nothing of what it holds"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, dill.x",
        "from pickle import loads",
        "from torch import load",
        "from . import types",
        "from ..config import Config",
        "from __future__ import annotations",
        "def f():\n    from .x import y",
        "torch.load(path)",
        "x = np.load(path)",
        "eval(text)",
        "build(trust_remote_code=True)",
        "build(**{'trust_remote_code': True})",
    ],
)
def test_the_search_finds(code: str) -> None:
    """Each of the things that must not be there."""
    assert len(list(banned(ast.parse(code)))) == 1


@pytest.mark.parametrize("code", ["model.eval()", "import torch", "from burnish import config"])
def test_the_search_passes(code: str) -> None:
    """What only looks like them."""
    assert not list(banned(ast.parse(code)))


def test_a_function_is_measured_without_its_docstring() -> None:
    """A long explanation is no fault."""
    code = 'def f(x):\n    """One.\n\n    Two.\n    """\n    return x\n'
    assert list(sizes(ast.parse(code))) == [("f", 2)]
