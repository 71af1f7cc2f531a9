"""Every public name says what it is for, and the examples in docstrings are true."""

import doctest
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

PACKAGE = Path(__file__).parents[2] / "src"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in (PACKAGE / "burnish").rglob("*.py")
)


def silent(module: ModuleType) -> Iterator[str]:
    """The public names of a module that have no docstring, inherited ones counted."""
    if not module.__doc__:
        yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            # Not inspect.getdoc: a class must speak for itself.
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):
                yield name
            for key, member in vars(value).items():
                if key.startswith("_") or not is_method(member) or key in dir(BaseModel):
                    continue
                if not inspect.getdoc(getattr(value, key)):
                    yield f"{name}.{key}"
        elif inspect.isroutine(value) and not inspect.getdoc(value):
            yield name


def is_method(member: object) -> bool:
    """Whether a member of a class is something that runs."""
    return inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_explains_itself(name: str) -> None:
    """Docstrings everywhere, and examples that hold."""
    module = importlib.import_module(name)
    assert not list(silent(module))
    result = doctest.testmod(module)
    assert result.failed == 0, f"{result.failed} examples of {name} are wrong"


def test_the_search_finds_what_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, functions, classes, methods; a dataclass's signature is no docstring."""
    code = (
        "from dataclasses import dataclass\n"
        "def f(): pass\n"
        "def _g(): pass\n"
        "class A:\n    def m(self): pass\n    @property\n    def p(self): pass\n"
        "class B(A):\n    '''B.'''\n    def m(self): pass\n"
        "@dataclass\nclass C:\n    x: int\n"
        "class D:\n    '''D.'''\n    def m(self):\n        '''m.'''\n"
        "class E(D):\n    '''E.'''\n    def m(self): pass\n"
    )
    module = ModuleType("example")
    # Inherited docstrings are looked up by the name of the module.
    monkeypatch.setitem(sys.modules, "example", module)
    exec(code, vars(module))
    assert list(silent(module)) == ["example", "f", "A", "A.m", "A.p", "B.m", "C"]
