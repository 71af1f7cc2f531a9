"""`burnish sample`: draw with a model, or edit a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.program import app
from burnish.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.exporting import Deployment
    from burnish.types import Prompt


@app.command(epilog="Example: burnish sample 'a large red circle' --model runs/miniature/student")
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Annotated[
        str, typer.Option(help="A pipeline folder, RUN/STAGE of a run folder, or embedded:...")
    ] = "embedded:weights/base",
    source: Annotated[
        list[Path] | None,
        typer.Option(help="Picture to edit; again for each further one.", metavar="IMAGE"),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="1 is no guidance; a stage's own if left out.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from; a stage's own if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    resolution: Annotated[int | None, typer.Option(min=32, max=4096, help="Pixels a side.")] = None,
    aspect: Annotated[
        str | None, typer.Option(help="Width to height, in place of a bucket.", metavar="16:9")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="PNG to write.", metavar="FILE")] = Path("sample.png"),
) -> None:
    """Draw, or edit a picture; one row per prompt.

    Every row has the same seeds. A prompt says what to draw, or with --source what to change.
    A stage, a merge and an export are drawn as their run says, the embedded base at 64 pixels in 6
    steps with a guidance of 2.5; any other pipeline at 1024 pixels a side, in 40 steps, with a
    guidance of 4 where it takes one, unless the options say otherwise.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"need a file name that ends in .png, got {out}; change --out")
    from burnish import images, tracking
    from burnish.exporting import deployed_model

    _check_size(resolution, aspect)
    model_folder, defaults = deployed_model(model)
    plan = defaults.changed(
        num_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        policy={"resolution": resolution, "aspects": None if aspect is None else [aspect]},
    )
    asked = [prompt for prompt in _asked(prompts, source or ()) for _ in range(count)]
    _check(plan, model_folder, asked)
    seeds = [seed + place for _ in prompts for place in range(count)]
    drawn = _draw(plan, model_folder, asked, seeds)
    sheet = images.grid([images.to_pil(image) for image in drawn], count)
    tracking.write_atomic(out, images.encode_png(sheet))
    print(out)


def _draw(
    plan: "Deployment", folder: Path, prompts: "Sequence[Prompt]", seeds: Sequence[int]
) -> "list[Tensor]":
    """A picture of each prompt."""
    from burnish import rollout, runtime
    from burnish.policy_config import load_policy
    from burnish.progress import progress

    rt = runtime.start()
    policy = load_policy(plan.policy.drawing(rt.dtype), folder, rt)
    with rt.autocast(), progress(f"draw ({plan})", len(prompts) * plan.num_steps) as bar:
        return rollout.draw(
            policy,
            prompts,
            num_steps=plan.num_steps,
            guidance=plan.guidance,
            seeds=seeds,
            on_step=bar.advance,
        )


def _check_size(resolution: int | None, aspect: str | None) -> None:
    """What is wrong with the options, in their own words."""
    from burnish.buckets import MULTIPLE, aspect_ratio

    if resolution is not None and resolution % MULTIPLE:
        near = round(resolution / MULTIPLE) * MULTIPLE
        raise ConfigError(
            f"--resolution: need a multiple of {MULTIPLE}, got {resolution}; take {near}"
        )
    try:
        aspect_ratio(aspect or "1:1")
    except ValueError as error:
        raise ConfigError(f"--aspect: {error}") from None


def _check(plan: "Deployment", folder: Path, prompts: "Sequence[Prompt]") -> None:
    """Raise, before weights are read, unless a model can draw what it is asked."""
    from burnish.policy_config import check_guidance, check_steps
    from burnish.shelves import policy_class

    family = policy_class(plan.policy.family)
    if (task := prompts[0].task) not in family.tasks:
        advice = "leave --source out" if task == "edit" else "add --source IMAGE"
        raise ConfigError(
            f"need {' or '.join(family.tasks)} for a model of {family.family}, got {task}; {advice}"
        )
    check_steps(family.family, folder, plan.num_steps)
    family.check_sources(prompts)
    family.check_sizes(folder, plan.policy.buckets)
    check_guidance(family.family, folder, plan.guidance.scale)


def _asked(texts: Sequence[str], paths: Sequence[Path]) -> "list[Prompt]":
    from burnish import images
    from burnish.types import Prompt

    sources = tuple(images.encode_png(images.read(path)) for path in paths)
    task = "edit" if sources else "t2i"
    return [
        Prompt(id=str(row), text=text, task=task, sources=sources) for row, text in enumerate(texts)
    ]
