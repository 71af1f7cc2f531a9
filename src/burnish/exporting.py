"""A trained model as others use it: a diffusers pipeline or a LoRA, and a card of what it is.

Before it is called done, the export is read again by a fresh pipeline, which must draw what the
model draws and not what the base does.
"""

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from burnish import images
from burnish.adapters import adapted, read_adapter
from burnish.config import EMBEDDED, Config, ConfigError, located, parse, read_yaml
from burnish.model_card import SAMPLES, Terms, model_card, renamed
from burnish.pipeline_folders import check_parts
from burnish.policy_config import PolicyConfig, load_policy
from burnish.precision import DTYPES
from burnish.prompts import read_prompts
from burnish.residency import Source, Stored
from burnish.run_config import BASE, STAGE, RunConfig
from burnish.run_folder import is_complete, model_folder
from burnish.runtime import ALONE, Runtime
from burnish.shelves import family_of, policy_class
from burnish.summary import read_run
from burnish.tracking import RunError, atomic_folder, write_atomic, write_json, writing
from burnish.types import Guidance

DEPLOYED = "burnish.json"
"""Name of the file of an export that says how the model is drawn with."""
_PICTURES = 8  # Of the base and of the model, side by side.


def export(
    folder: Path,
    policy: str,
    out: Path,
    rt: Runtime,
    *,
    terms: Terms,
    as_lora: bool = False,
) -> Path:
    """Write a policy of a run as a folder for others; returns it.

    Args:
        folder: of the run.
        policy: a stage or merge.
        out: folder to write; it must not exist.
        rt: device.
        terms: under which it is given to others, for the card.
        as_lora: write the LoRA of a stage that trained one, instead of the whole pipeline.

    Raises:
        ConfigError: no such policy, one that is not complete or not a LoRA, or a folder that
            exists.
        RunError: a fresh pipeline does not draw what the model draws.
    """
    config = read_run(folder)
    _check(config, folder, policy, out, as_lora=as_lora)
    family = policy_class(config.policy.family)
    model = model_folder(folder, STAGE + policy)
    with atomic_folder(out) as unfinished, writing(out):
        if as_lora:
            shutil.copytree(folder / "stages" / policy / "lora", unfinished)
        else:
            # Nothing is drawn yet.
            load_policy(config.policy, model, ALONE).save(unfinished)
        check_export(config, policy, model, unfinished, rt, as_lora=as_lora)
        _write_pictures(folder, policy, unfinished / SAMPLES)
        card = model_card(
            config,
            folder,
            policy,
            terms=terms,
            family=family,
            as_lora=as_lora,
            has_pictures=(unfinished / SAMPLES).is_file(),
        )
        write_atomic(unfinished / "README.md", card)
        deployed = Deployment.of(renamed(config, terms.base_model), policy)
        write_json(unfinished / DEPLOYED, deployed.model_dump(mode="json"))
    return out


class Deployment(Config):
    """How a model is drawn with; the defaults are for a pipeline that says nothing of it."""

    policy: PolicyConfig = PolicyConfig()
    num_steps: int = Field(default=40, ge=1)
    guidance_scale: float = Field(default=4.0, ge=1)
    negative_prompt: str = ""
    seed: int = 0
    """Of the pictures by which it is measured."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of its network."""

    @property
    def guidance(self) -> Guidance:
        """Scale and negative prompt."""
        return Guidance(self.guidance_scale, self.negative_prompt)

    def __str__(self) -> str:
        sizes = ", ".join(self.policy.buckets.names)
        return f"{sizes} pixels, {self.num_steps} steps, guidance {self.guidance_scale:g}"

    def changed(self, *, policy: Mapping[str, Any], **own: Any) -> "Deployment":
        """With other settings; None leaves one as it is.

        Raises:
            ConfigError: a value that is none.
        """
        plain = self.model_dump(mode="json")
        plain |= {name: value for name, value in own.items() if value is not None}
        plain["policy"] |= {name: value for name, value in policy.items() if value is not None}
        return parse(Deployment, plain)

    @classmethod
    def of(cls, config: RunConfig, policy: str) -> "Deployment":
        """As a run deploys one of its policies."""
        settings = config.deployed(policy).settings()
        return cls(
            policy=config.policy,
            num_steps=config.evaluation.num_steps,
            seed=config.evaluation.seed,
            dtype=config.runtime.dtype,
            **settings,
        )

    @classmethod
    def read(cls, folder: Path) -> "Deployment | None":
        """As an export says; None for any other folder.

        Raises:
            ConfigError: its file cannot be read.
        """
        path = folder / DEPLOYED
        if not path.is_file():
            return None
        return parse(cls, read_yaml(path), where=str(path))


def deployed_model(text: str) -> tuple[Path, Deployment]:
    """The pipeline folder that a text means, and how its run or its export draws with it.

    Args:
        text: a pipeline folder, RUN/STAGE of a run folder, or `embedded:...`.

    Raises:
        ConfigError: no whole pipeline there, or of a stage that is not complete.
    """
    folder, deployment = _deployed(text)
    check_parts(folder)
    return folder, deployment


def _deployed(text: str) -> tuple[Path, Deployment]:
    place = located(text)
    if place.name == BASE and (place.parent / "run.json").is_file():
        config = read_run(place.parent)
        return located(config.policy.path), Deployment.of(config, BASE)
    options = (place, place / "model", place.parent / "stages" / place.name / "model")
    folder = next((path for path in options if (path / "model_index.json").is_file()), None)
    if folder is None:
        known = [str(place / path.parent.name) for path in sorted(place.glob("stages/*/model"))]
        advice = f"take {known[-1]}" if known else "check the path"
        raise ConfigError(f"need a folder that a pipeline was saved in, got {text}; {advice}")
    name, ran = folder.parent.name, folder.parents[2] if len(folder.parents) > 2 else folder
    if folder.name == "model" and (ran / "run.json").is_file():
        if not is_complete(ran, f"train/{name}"):
            raise ConfigError(
                f"need a stage that is complete, {name} of {ran} is not; resume its run first"
            )
        config = read_run(ran)
        return folder, Deployment.of(config, name)
    if (exported := Deployment.read(folder)) is not None:
        return folder, exported
    if text.startswith(EMBEDDED):
        small = PolicyConfig(resolution=64)
        return folder, Deployment(policy=small, num_steps=6, guidance_scale=2.5)
    family = family_of(folder)
    kind, plain = policy_class(family), Deployment(policy=PolicyConfig(family=family))
    steps, scale = kind.fixed_steps(folder), kind.fixed_guidance(folder)
    return folder, plain.changed(policy={}, num_steps=steps, guidance_scale=scale)


def _check(config: RunConfig, folder: Path, policy: str, out: Path, *, as_lora: bool) -> None:
    if out.exists():
        raise ConfigError(f"need a folder that does not exist yet, got {out}; change --out")
    if policy not in config.policies():
        raise ConfigError(
            f"need a stage or merge of {folder}, got {policy!r}; take one of "
            f"{', '.join(config.policies())}"
        )
    job = f"{'merge' if policy in config.merges else 'train'}/{policy}"
    if not is_complete(folder, job):
        raise ConfigError(
            f"need a stage that is complete, {policy} of {folder} is not; resume its run first"
        )
    stage = config.stages.get(policy)
    if as_lora and (stage is None or stage.lora is None):
        raise ConfigError(
            f"need a stage that trained a LoRA, {policy} did not; leave --lora out, or train it "
            "with lora.rank"
        )
    if as_lora and stage is not None and stage.start != BASE:
        raise ConfigError(
            f"need a LoRA on the base, {policy} has one on {stage.start}; leave --lora out"
        )


def check_export(
    config: RunConfig, policy: str, model: Path, out: Path, rt: Runtime, *, as_lora: bool
) -> None:
    """Draw with a fresh pipeline of the export what the model draws, and the base does not.

    Args:
        config: of the run.
        policy: a stage or merge.
        model: its folder in the run.
        out: folder of the export.
        rt: device, which one pipeline after another is on.
        as_lora: whether the export is a LoRA.

    Raises:
        RunError: it draws something else, or what the base draws.
    """
    base = located(config.policy.path)
    wanted, before = (_drawn(config, policy, folder, rt) for folder in (model, base))
    if as_lora:
        found = _drawn(config, policy, base, rt, lora=out)
    else:
        found = _drawn(config, policy, out, rt)
    moved, missed = (float((other - wanted).abs().mean()) for other in (before, found))
    if missed >= 0.01 * moved:
        raise RunError(
            f"need an export that draws what {policy} draws, got latents that differ by "
            f"{missed:.3g} on average where the base differs by {moved:.3g}; export it again"
        )


@torch.no_grad()
def _drawn(
    config: RunConfig, policy: str, folder: Path, rt: Runtime, *, lora: Path | None = None
) -> Tensor:
    """Clean latents of the first held-out prompt by the own call of a folder's pipeline, which
    casts and moves nothing: all of it gets one type and one place first."""
    # Parts of the pipeline before this one know each other in circles.
    gc.collect()
    model: Any = load_policy(config.policy.drawing(rt.dtype), folder, rt)
    if lora is not None:
        # As the stage added it: to the base as it was trained beside, not as rounded to be drawn.
        stored, trained = Stored(Source(folder)), DTYPES[config.policy.dtype]
        own = {name: stored.read(name).to(trained) for name in stored.shapes}
        merged = adapted(own, read_adapter(lora), where=str(lora))
        model.transformer.load_state_dict(merged)
    for network in model.networks().values():
        nn.Module.to(network, model.device, model.dtype)
    task = config.tasks(policy)[0]
    every = read_prompts(located(config.evaluation.prompts))
    guidance = config.deployed(policy)
    latents: Tensor = model.pipeline_latents(
        every.select(lambda prompt: prompt.task == task)[0],
        model.noise([torch.Generator().manual_seed(0)]),
        num_steps=config.evaluation.num_steps,
        guidance_scale=guidance.scale,
        negative_prompt=guidance.negative_prompt,
    )
    return latents.float().cpu()


def _write_pictures(folder: Path, policy: str, path: Path) -> None:
    """The same held-out prompts by the base, above, and by the model, if both were measured."""
    places = [folder / "evaluation" / name / "pictures" for name in (BASE, policy)]
    found = [{file.name for file in place.glob("*.webp")} for place in places]
    # Spread over the set, so that every category is there.
    names = sorted(found[0] & found[1])
    names = names[:: max(1, len(names) // _PICTURES)][:_PICTURES]
    if names:
        shown = [images.read(place / name) for place in places for name in names]
        path.write_bytes(images.encode_png(images.grid(shown, len(names))))
