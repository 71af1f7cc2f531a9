"""The README's map equals the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"( +)(\S+?)(/?)  +(\S.*)")


def mapped(text: str) -> dict[str, set[str]]:
    """The entries of the map's tree and, of folders that list theirs, their children."""
    block = text.split("<!-- map -->")[1]
    lines = [line for line in block.splitlines() if line.strip() and "```" not in line]
    assert lines[0] == "src/burnish/"
    entries: dict[str, set[str]] = {}
    parent = ""
    for line in lines[1:]:
        match = LINE.fullmatch(line)
        assert match, f"need `name  what it is for` in the map, got {line!r}"
        indent, name = len(match[1]), match[2] + match[3]
        if indent == 2:
            assert name not in entries, f"{name} stands twice"
            entries[name], parent = set(), name
        else:
            assert indent == 4 and parent.endswith("/"), f"{line!r} has no folder above it"
            entries[parent].add(name)
    return entries


def packaged(folder: Path) -> set[str]:
    """Files and folders of a package that hold something, without the dunder files."""
    found = set()
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            if any(p.is_file() and p.suffix != ".pyc" for p in path.rglob("*")):
                found.add(f"{path.name}/")
        elif path.suffix == ".py" and not path.name.startswith("__"):
            found.add(path.name)
    return found


def test_the_map_equals_the_package() -> None:
    """Every file and folder has its line, and every line its file or folder."""
    package = ROOT / "src" / "burnish"
    entries = mapped((ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(entries) == packaged(package)
    for name, children in entries.items():
        if children:
            assert children == packaged(package / name)


def test_the_map_is_read_as_it_is_written() -> None:
    """Folders may list their children; a line without words is an error."""
    head = "x\n<!-- map -->\n```\nsrc/burnish/\n"
    text = f"{head}  a.py    one thing\n  b/    more\n    c.py   two\n```\n<!-- map -->\n"
    assert mapped(text) == {"a.py": set(), "b/": {"c.py"}}
    for line in ("  a.py", "    c.py   two"):
        with pytest.raises(AssertionError):
            mapped(f"{head}{line}\n```\n<!-- map -->")
