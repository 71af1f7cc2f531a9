"""The card of a trained model: what it is, how it is drawn, what was measured and what was not.

Written from the run that made the model, with the front matter of the hub. `card.md.j2` has the
words.
"""

import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from burnish import html
from burnish.config import EMBEDDED, ConfigError, dump_yaml
from burnish.ledger import digest_of
from burnish.policies.base import Policy
from burnish.rewards.base import RewardConfig
from burnish.run_config import BASE, RunConfig
from burnish.run_folder import all_scores
from burnish.significance import MIN_PROMPTS
from burnish.summary import summarise, teachers
from burnish.tables import shown

SAMPLES = "samples.png"
"""Name of the pictures beside the card."""
_TASKS = {"t2i": "text-to-image", "edit": "image-to-image"}
"""As the hub calls them."""
UNNAMED = "BASE"
"""What a card calls a base that has no name on the hub: a path is of no use to others."""
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other
pddl postgresql unknown unlicense wtfpl zlib
"""
"""Identifiers that the hub takes for a licence; any other is `other` with a name and a link."""


@dataclass(frozen=True)
class Terms:
    """Under what, and as a descendant of whom, a model is given to others.

    Raises:
        ConfigError: a licence or a base that the hub would not take.

    >>> Terms("mit").licence_facts
    {'license': 'mit'}
    """

    licence: str
    """Identifier of the hub, or the name of another licence."""
    licence_link: str | None = None
    """To the text of another licence."""
    base_model: str | None = None
    """ORG/NAME of the base on the hub; None leaves it unnamed."""

    def __post_init__(self) -> None:
        if self.licence_link is None and self.licence not in _LICENCES.split():
            raise ConfigError(
                "need a licence that the hub knows, such as apache-2.0, got "
                f"{self.licence!r}; add --licence-link URL for another one, or LICENSE for a file "
                "that you put beside the card"
            )
        if self.base_model is not None and not _is_of_hub(self.base_model):
            raise ConfigError(
                f"need the base as ORG/NAME of the hub, got {self.base_model!r}; leave "
                "--base-model out for one that is not there"
            )

    @property
    def licence_facts(self) -> dict[str, Any]:
        """The front matter of the licence."""
        if self.licence_link is None:
            return {"license": self.licence}
        facts = {"license_name": self.licence, "license_link": self.licence_link}
        return {"license": "other"} | facts


def _is_of_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def model_card(
    config: RunConfig,
    folder: Path,
    policy: str,
    *,
    terms: Terms,
    family: type[Policy[Any, Any]],
    as_lora: bool = False,
    has_pictures: bool = False,
) -> str:
    """The card in Markdown.

    Args:
        config: of the run.
        folder: of the run.
        policy: a stage or merge.
        terms: under which it is given to others.
        family: whose pipeline it is.
        as_lora: the model is a LoRA on its base.
        has_pictures: there are pictures beside the card.
    """
    summary = summarise(config, folder, all_scores(config, folder))
    config = renamed(config, terms.base_model)
    call: Any = family.pipeline_class.__call__
    tasks, ancestors = config.tasks(policy), list(_ancestors(config, folder, policy))
    front = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASKS[tasks[0]],
        base_model=terms.base_model,
        tags=["burnish", *(["lora"] if as_lora else [])],
        **terms.licence_facts,
    )
    return html.template("card.md.j2").render(
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
        unnamed=UNNAMED,
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
        ancestors=ancestors,
        limits=list(_limits(summary, {one["name"] for one in ancestors}, tasks)),
        shown=shown,
    )


def renamed(config: RunConfig, base_model: str | None) -> RunConfig:
    """A run as others may read it, its base by the name that it has for them."""
    own = config.policy.path
    name = base_model or (own if own.startswith(EMBEDDED) else UNNAMED)
    return config.model_copy(update={"policy": config.policy.model_copy(update={"path": name})})


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


def _limits(
    summary: Mapping[str, Any], names: Collection[str], tasks: Sequence[str]
) -> Iterator[str]:
    """What a reader of the numbers must know of the policy and those that it was made of."""
    yield from (found["says"] for found in summary["shared"] if found["stage"] in names)
    for stage in summary["cost"]:
        if stage["stage"] in names and stage["runaway"]:
            yield f"The updates of {stage['stage']} ran away: {stage['runaway']}."
    counts = [
        r["score"]["num_prompts"] for r in summary["results"] if r["task"] in tasks and r["score"]
    ]
    if min(counts, default=MIN_PROMPTS) < MIN_PROMPTS:
        yield f"Brackets over fewer than {MIN_PROMPTS} prompts are too narrow."


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
