"""What the numbers of a run do not say: what is missing, invalid, or not what it is taken for."""

from collections.abc import Iterator, Mapping
from typing import Any

from burnish.config import ConfigError
from burnish.contamination import contamination
from burnish.run_config import BASE, BASES, RunConfig
from burnish.significance import MIN_PROMPTS


def caveats(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs beside the numbers of a run.

    Returns:
        `missing`, a sentence for each thing that they do not say; `prompts`, what the prompts that
        measure may be called; `shared`, the sentences about those that a stage is trained on, by
        stage.
    """
    try:
        trained = {name: stage.prompts.read() for name, stage in config.stages.items()}
        shared = list(contamination(config, trained))
    except ConfigError as error:
        unknown = f"Whether what is measured is held out is not known: {error}."
        return {"prompts": "prompts", "missing": [*_missing(summary), unknown], "shared": []}
    is_held_out = all(found.key != "evaluation.prompts" for found in shared)
    return {
        "prompts": "held-out prompts" if is_held_out else "prompts that are not all held out",
        "missing": [*_missing(summary), *(f"{found}." for found in shared)],
        "shared": [{"stage": found.stage, "says": f"{found}."} for found in shared],
    }


def _missing(summary: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for every thing a complete run would have."""
    for stage in summary["cost"]:
        if not stage["is_complete"]:
            done = f"{stage['steps']} of {stage['planned_steps']} steps"
            yield f"The stage {stage['stage']} is not trained to its end ({done})."
        if stage["runaway"]:
            yield f"The updates of the stage {stage['stage']} ran away: {stage['runaway']}."
        if stage["unscored"]:
            share = f"{stage['unscored']} of {stage['steps']} steps"
            yield f"The stage {stage['stage']} learnt nothing in {share}, whose scores failed."
    for result in summary["results"]:
        where = f"{result['policy']} on {result['task']}"
        if result["score"] is None:
            yield f"There are no scores of {where}."
        elif not result["is_valid"]:
            name = BASE if result["policy"] in BASES else result["policy"]
            again = f"without evaluation/{name}/DONE the same command measures again"
            yield (
                f"The scores of {where} are invalid: {result['num_failed']} pictures have none "
                f"({again})."
            )
    for space in summary["headroom"]:
        if space["best"] is None:
            yield f"There is no best-of-{summary['best_of']} of the base on {space['task']}."
    for kept in summary["distillation"]:
        if kept["kept"] is None:
            names = f"{kept['student']} keeps of {kept['teacher']} on {kept['label']}"
            yield f"What {names} cannot be said: {kept['reason']}."
    if not any(policy["role"] == "student" for policy in summary["policies"]):
        yield "There is no student: the recipe has no stage that distills."
    scores = [(r["task"], r["score"]) for r in summary["results"] if r["score"]]
    few = {task for task, score in scores if 0 < score["num_prompts"] < MIN_PROMPTS}
    for task in sorted(few):
        yield f"Brackets of {task} are too narrow: they are over fewer than {MIN_PROMPTS} prompts."
    if not summary["knowledge"]:
        yield "Nothing is known of forgetting: there are no scores on knowledge prompts."
