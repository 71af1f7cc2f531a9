"""Pictures side by side: what every policy drew for the same prompts from the same seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from burnish import html, images
from burnish.config import located
from burnish.evaluation import HEADLINE, Row
from burnish.prompts import read_prompts, spaced
from burnish.run_config import BASE, RunConfig
from burnish.run_folder import all_scores
from burnish.summary import KNOWLEDGE, knowledge_ids
from burnish.types import Labelled, Prompt

TASKS = {"t2i": "Text to image", "edit": "Editing"}
"""Tasks in the words of the page."""


def in_words(label: str) -> str:
    """A teacher's label, a task or a category of one, in the words of the page.

    >>> in_words("t2i/portrait")
    'Text to image, portrait'
    """
    task, _, category = label.partition("/")
    return f"{TASKS[task]}, {category}" if category else TASKS[task]


MAX_BYTES = 4_000_000
"""Largest page; one with more shows fewer pictures."""


def with_galleries(
    template: Template,
    context: Mapping[str, Any],
    config: RunConfig,
    folder: Path,
    counts: Sequence[int],
) -> str:
    """A page with as many pictures as it may hold.

    Args:
        template: that shows `galleries`.
        context: all else that it shows.
        config: of the run whose pictures these are.
        folder: of that run.
        counts: prompts of each category, falling; the first whose page is small enough is taken.
    """
    rows, text = all_scores(config, folder), ""
    for count in counts:
        text = template.render(**context, galleries=galleries(config, folder, rows, count))
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def galleries(
    config: RunConfig, folder: Path, rows: Sequence[Row], count: int
) -> list[dict[str, Any]]:
    """Pictures side by side: a gallery for each task, and one of the knowledge prompts."""
    plan, known = config.evaluation, knowledge_ids(config)
    scores = {
        (row["policy"], row["prompt"], row["metric"]): row["value"]
        for row in rows
        if row["seed"] == 0
    }
    held_out = read_prompts(located(plan.prompts)).select(lambda p: p.id not in known)
    sets = [
        (task, TASKS[task], False, held_out.select(lambda p, task=task: p.task == task))
        for task in config.tasks(BASE)
    ]
    if plan.knowledge is not None:
        sets.append(("", "Knowledge", True, read_prompts(located(plan.knowledge))))
    found = []
    for task, name, is_knowledge, prompts in sets:
        shown_tasks = {entry.task for entry in prompts.entries}
        policies = [
            policy
            for policy in (BASE, *config.policies())
            if policy == BASE or shown_tasks & set(config.tasks(policy))
        ]
        drawn = prompts.select(
            lambda p, policies=policies: any(_picture(folder, policy, p) for policy in policies)
        )
        metrics = (*KNOWLEDGE, HEADLINE) if is_knowledge else (HEADLINE,)
        kinds: dict[str, list[Prompt]] = {}
        for prompt in drawn:
            kind = prompt.tags[0] if is_knowledge and prompt.tags else prompt.category
            kinds.setdefault(kind, []).append(prompt)
        groups = [
            (kind, [_row(folder, p, policies, scores, metrics) for p in spaced(members, count)])
            for kind, members in kinds.items()
        ]
        found.append({"task": task, "name": name, "is_knowledge": is_knowledge, "groups": groups})
    return found


def _row(
    folder: Path,
    prompt: Prompt,
    policies: Sequence[str],
    scores: Mapping[tuple[str, str, str], float | None],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """One prompt and what every policy drew for it."""
    told = [m for m in metrics if any((p, prompt.id, m) in scores for p in policies)]
    metric = told[0] if told else HEADLINE
    shots = []
    for policy in policies:
        path = _picture(folder, policy, prompt)
        picture = html.embedded(images.read(path)) if path else None
        score = scores.get((policy, prompt.id, metric))
        shots.append({"policy": policy, "picture": picture, "score": score})
    sources = html.sources(prompt.sources, where=prompt.id)
    return {"text": prompt.text, "sources": sources, "shots": shots, "metric": metric}


def _picture(folder: Path, policy: str, prompt: Labelled) -> Path | None:
    name = f"{prompt.id}.webp"
    path = folder / "evaluation" / policy / "pictures" / name
    # An id is other people's text and must not lead out of the folder.
    return path if path.name == name and path.is_file() else None
