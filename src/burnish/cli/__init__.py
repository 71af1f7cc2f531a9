"""The commands. Their job is to read what the user means; what they do is written elsewhere.

One file for each group of commands; importing it hangs them on the program.
"""

from burnish.cli import (
    arena,
    bench,
    machine,
    models,
    pictures,
    prompts,
    recipes,
    rewards,
    runs,
    studies,
)
from burnish.cli.program import main

__all__ = [
    "arena",
    "bench",
    "machine",
    "main",
    "models",
    "pictures",
    "prompts",
    "recipes",
    "rewards",
    "runs",
    "studies",
]
