"""`burnish sample`: draw with a model, or edit a picture."""

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.program import app
from burnish.config import ConfigError


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
        float | None, typer.Option(min=0, help="1 is no guidance; a stage's own if left out.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from; a stage's own if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    resolution: Annotated[int | None, typer.Option(min=32, help="Side in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="PNG to write.", metavar="FILE")] = Path("sample.png"),
) -> None:
    """Draw, or edit a picture; one row per prompt.

    Every row has the same seeds. A prompt says what to draw, or with --source what to change.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"need a file name that ends in .png, got {out}; change --out")
    from burnish import images, rollout, runtime, tracking
    from burnish.exporting import deployed_model
    from burnish.shelves import load_policy, policy_class
    from burnish.types import Guidance, Prompt

    sources = tuple(images.encode_png(images.read(path)) for path in source or ())
    model_folder, defaults = deployed_model(model)
    policy = defaults.policy.model_copy(
        update={"resolution": resolution or defaults.policy.resolution}
    )
    guidance = Guidance(
        defaults.guidance_scale if guidance_scale is None else guidance_scale,
        defaults.negative_prompt if negative_prompt is None else negative_prompt,
    )
    asked = [
        Prompt(id=str(row), text=text, task="edit" if sources else "t2i", sources=sources)
        for row, text in enumerate(prompts)
        for _ in range(count)
    ]
    policy_class(policy.family).check_sources(asked)
    rt = runtime.start()
    drawer = load_policy(policy, model_folder, rt)
    with rt.autocast():
        drawn = rollout.draw(
            drawer,
            asked,
            num_steps=steps or defaults.num_steps,
            guidance=guidance,
            seeds=[seed + place for _ in prompts for place in range(count)],
        )
    sheet = images.grid([images.to_pil(image) for image in drawn], count)
    with tracking.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tracking.write_atomic(out, images.encode_png(sheet))
    print(out)
