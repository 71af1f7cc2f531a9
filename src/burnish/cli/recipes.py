"""The recipes that ship with the package, and the command that lists them."""

import itertools
from pathlib import Path

from burnish.cli.program import app
from burnish.config import ConfigError, read_yaml
from burnish.wording import nearest

RECIPES = Path(__file__).parents[1] / "recipes"
"""Complete runs that ship with the package."""


@app.command(epilog="Example: burnish recipes")
def recipes() -> None:
    """List the recipes: purpose, hardware, time."""
    for name, path in known_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        header = itertools.takewhile(lambda line: line.startswith("#"), lines)
        words = [f"    {line[1:].strip()}".rstrip() for line in header]
        print(f"{name} ({evidence(path)})", *words, "", sep="\n")


def known_recipes() -> dict[str, Path]:
    """The file of every recipe, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def evidence(path: Path) -> str:
    """What is known of a recipe, see `RunConfig.evidence`."""
    return str(read_yaml(path).get("evidence", "untested"))


def recipe_path(recipe: str) -> Path:
    """The file of a recipe's name or path.

    Raises:
        ConfigError: neither; the nearest name is given.
    """
    known = known_recipes()
    if recipe in known:
        return known[recipe]
    if recipe.endswith((".yaml", ".yml")) or Path(recipe).is_file():
        return Path(recipe)
    near = nearest(recipe, list(known))
    advice = f"did you mean {near!r}?" if near else f"the recipes are {', '.join(known)}"
    raise ConfigError(f"need a recipe's name or a YAML file, got {recipe!r}; {advice}")
