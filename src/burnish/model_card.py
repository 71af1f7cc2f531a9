"""The card of a trained model: what it is, how it is drawn, what was measured and what was not.

Written from the run that made the model, with the front matter of the hub. `card.md.j2` has the
words.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from burnish import page
from burnish.config import EMBEDDED, dump_yaml
from burnish.ledger import digest_of
from burnish.policies.base import Policy
from burnish.rewards.base import RewardConfig
from burnish.run_config import BASE, RunConfig
from burnish.summary import teachers, write_summary
from burnish.tables import shown

SAMPLES = "samples.png"
"""Name of the pictures beside the card."""
_TASKS = {"t2i": "text-to-image", "edit": "image-to-image"}
"""As the hub calls them."""


def model_card(
    config: RunConfig,
    folder: Path,
    policy: str,
    *,
    licence: str,
    family: type[Policy[Any, Any]],
    as_lora: bool = False,
    has_pictures: bool = False,
) -> str:
    """The card in Markdown.

    Args:
        config: of the run.
        folder: of the run.
        policy: a stage or merge.
        licence: SPDX identifier.
        family: whose pipeline it is.
        as_lora: the model is a LoRA on its base.
        has_pictures: there are pictures beside the card.
    """
    summary = write_summary(folder)
    call: Any = family.pipeline_class.__call__
    tasks = config.tasks(policy)
    front = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=_TASKS[tasks[0]],
        base_model=config.policy.path,
        tags=["burnish", *(["lora"] if as_lora else [])],
    )
    return page.template("card.md.j2").render(
        front=front.to_yaml(),
        config=config,
        recipe=dump_yaml(config),
        policy=policy,
        base=BASE,
        merge=config.merges.get(policy),
        taught=list(dict.fromkeys(teachers(config, policy).values())),
        stage=config.stages.get(policy),
        guidance=config.deployed(policy),
        folds_guidance=config.folds_guidance(policy),
        family=family,
        # That of FLUX.2 [klein] takes its embedding alone.
        takes_negative="negative_prompt" in inspect.signature(call).parameters,
        sizes=config.policy.buckets.sizes,
        is_embedded=config.policy.path.startswith(EMBEDDED),
        tasks=tasks,
        as_lora=as_lora,
        samples=SAMPLES if has_pictures else None,
        summary=summary,
        headline=" and ".join(dict.fromkeys(summary["headlines"][task] for task in tasks)),
        judges=list(dict.fromkeys(_judge(j) for t, j in config.judges.items() if t in tasks)),
        results=list(_results(config, summary, policy)),
        kept=[row for row in summary["distillation"] if row["student"] == policy and row["kept"]],
        knowledge=[r for r in summary["knowledge"] if r["policy"] == policy and r["points"]],
        ancestors=list(_ancestors(config, folder, policy)),
        shown=shown,
    )


def _judge(judge: RewardConfig) -> str:
    """Of what kind a judge is, which one, and what it scores."""
    known = [getattr(judge, name, None) for name in ("kind", "model", "path", "dimension")]
    return " ".join(f"`{part}`" for part in known if part)


def _results(
    config: RunConfig, summary: Mapping[str, Any], policy: str
) -> Iterator[dict[str, Any]]:
    """Of the policy and of the base, on the policy's tasks."""
    for row in summary["results"]:
        if row["policy"] in (BASE, policy) and row["task"] in config.tasks(policy):
            yield {**row, "guidance": config.deployed(row["policy"]).scale}


def _ancestors(config: RunConfig, folder: Path, policy: str) -> Iterator[dict[str, Any]]:
    """The policy and all that it was made of, in the order of the run."""
    found, front = set[str](), {policy}
    while front:
        found |= front
        parts: set[str] = set()
        for name in front & set(config.policies()):
            stage, merge = config.stages.get(name), config.merges.get(name)
            parts |= set(merge.of if merge else ())
            parts |= {stage.start, *teachers(config, name).values()} if stage else set()
        front = parts - found
    made = [job.split("/")[1] for job in config.jobs() if job.startswith(("train/", "merge/"))]
    for name in (name for name in made if name in found):
        stage, merge = config.stages.get(name), config.merges.get(name)
        if stage is None:
            yield {"name": name, "merge": merge, "stage": None}
            continue
        path = stage.prompts.path
        yield {
            "name": name,
            "stage": stage,
            "teachers": teachers(config, name),
            "sets": [path] if isinstance(path, str) else list(path),
            "digests": _digests(folder / "stages" / name / "rewards.json"),
        }


def _digests(path: Path) -> dict[str, str]:
    """What every reward was read from, as it was pinned when the stage began."""
    pinned = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {name: name.removeprefix("the files of ") for name in pinned}
    return {
        names[name]: "no files" if digest == digest_of(()) else f"files `{digest}`"
        for name, digest in pinned.items()
    }
