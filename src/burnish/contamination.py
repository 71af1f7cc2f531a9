"""Prompts that a run is both trained and measured on: what it gains on them is not held out.

Text, task and sources are compared, see `PromptSet.shared`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from burnish.config import located
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts
from burnish.run_config import RunConfig


class ContaminationWarning(UserWarning):
    """Prompts that measure are trained on."""


class Contamination(NamedTuple):
    """What a set that measures has in common with the prompts of a stage."""

    stage: str
    key: str
    """Of the set, in a recipe."""
    ids: tuple[str, ...]
    """Of the prompts in common, in the set that measures."""
    num_prompts: int
    """Of that set, for the tasks of the stage."""

    def __str__(self) -> str:
        return (
            f"{len(self.ids)} of the {self.num_prompts} prompts of {self.key} are among those of "
            f"the stage {self.stage} (one is {self.ids[0]!r}): what it gains on them is not held "
            "out"
        )


def contamination(config: RunConfig, trained: Mapping[str, PromptSet]) -> Iterator[Contamination]:
    """What each set that measures has in common with each stage; nothing where it has nothing.

    Args:
        config: of the run.
        trained: prompts of each stage.

    Raises:
        ConfigError: a set cannot be read.
    """
    plan = config.evaluation
    for key, path in (("prompts", plan.prompts), ("knowledge", plan.knowledge)):
        if path is None:
            continue
        measured = read_prompts(located(path))
        for stage, prompts in trained.items():
            if shared := tuple(entry.id for entry in measured.shared(prompts).entries):
                tasks = config.stages[stage].prompts.tasks
                able = measured.select(lambda prompt, tasks=tasks: prompt.task in tasks)
                yield Contamination(stage, f"evaluation.{key}", shared, len(able))
