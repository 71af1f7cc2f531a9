"""The floors of the house: who may import whom, held for the package and tried on broken copies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(root: Path) -> tuple[int, str]:
    """Exit status and words of import-linter on the package below a root."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_are_kept() -> None:
    """All of them, for every module."""
    status, words = lint(ROOT)
    assert status == 0, words
    assert "Contracts: 8 kept, 0 broken" in words


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's sources that may be spoilt."""
    for path in sorted((ROOT / "src" / "burnish").rglob("*.py")):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "code", "contract"),
    [
        ("stray.py", "", "every module has a floor"),
        ("types.py", "import burnish.checkpoint", "lower floors only"),
        ("images.py", "import burnish.config", "lower floors only"),
        ("judges/probes.py", "import burnish.judges.trust", "in no circle"),
        ("objectives.py", "import burnish.types", "The maths knows neither"),
        ("rewards/first.py", "import burnish.rewards.second", "Rewards do not know"),
        ("policies/first.py", "import burnish.policies.second", "Policies do not know"),
        ("algorithms/first.py", "import burnish.algorithms.second", "Algorithms do not know"),
    ],
)
def test_a_breach_is_found(copy: Path, place: str, code: str, contract: str) -> None:
    """A file without a floor, an import upwards or sideways, maths that knows records."""
    path = copy / "src" / "burnish" / place
    if "second" in code:
        path.with_name("second.py").write_text("")
    with path.open("a") as file:
        file.write(f"\n{code}\n")
    status, words = lint(copy)
    assert status != 0
    broken = [line for line in words.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), words
