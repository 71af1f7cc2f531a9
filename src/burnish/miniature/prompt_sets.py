"""The miniature's prompt sets: what is trained on, what is held out, and what no reward rewards.

* `train`: flat scenes and edits without held-out combinations, without named people and styles;
* `held-out`: combinations that no prompt of the base model's training or of a stage asks for;
* `knowledge`: named people and styles, to see what a stage forgets;
* `reminders`: the same people and styles in other scenes, for a stage that needs no reward;
* `pictures`: held-out combinations with the picture that answers each.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from burnish.images import encode_png
from burnish.miniature.pictures import to_bytes
from burnish.rewards.face import CHANGES_IDENTITY
from burnish.types import Prompt
from burnish.world.edits import Edit, sample_edit
from burnish.world.grammar import say
from burnish.world.render import render
from burnish.world.scenes import (
    CATEGORIES,
    LOOK,
    PEOPLE,
    STYLES,
    Scene,
    attribute,
    is_held_out,
    sample_scene,
)


def scene_prompt(name: str, scene: Scene, rng: np.random.Generator, tag: str = "") -> Prompt:
    """A text-to-image prompt that knows its scene."""
    tags = (tag,) if tag else ()
    return Prompt(
        id=name, text=say(scene, rng), category=scene.category, tags=tags, facts=scene.to_json()
    )


def edit_prompt(name: str, edit: Edit) -> Prompt:
    """An edit prompt that knows its target; the source is the clean picture."""
    source = encode_png(Image.fromarray(to_bytes(render(edit.source))))
    is_another = any(attribute(key) in LOOK for key in edit.changes)
    return Prompt(
        id=name,
        text=edit.instruction,
        task="edit",
        category=edit.source.category,
        sources=(source,),
        tags=(CHANGES_IDENTITY,) if is_another else (),
        facts=edit.to_json(),
    )


def _distinct(make: Callable[[int], Prompt], count: int) -> list[Prompt]:
    found: dict[tuple[str, tuple[bytes, ...]], Prompt] = {}
    number = 0
    while len(found) < count:
        prompt = make(number)
        number += 1
        found.setdefault((prompt.text, prompt.sources), prompt)
    return list(found.values())


def world_prompts(split: str, count: int, seed: int, *, is_held: bool) -> list[Prompt]:
    """`count` prompts of each task, categories in turn, all with or all without held-out
    combinations."""
    rng = np.random.default_rng(seed)

    def text(number: int) -> Prompt:
        category = CATEGORIES[number % len(CATEGORIES)]
        scene = sample_scene(rng, category=category, style="flat")
        while is_held_out(scene) != is_held:
            scene = sample_scene(rng, category=category, style="flat")
        return scene_prompt(f"{split}-t2i-{number}", scene, rng)

    def edit(number: int) -> Prompt:
        category = CATEGORIES[number % len(CATEGORIES)]
        while True:
            drawn = sample_edit(rng, category=category)
            held = is_held_out(drawn.source) or is_held_out(drawn.target)
            if held == is_held:
                return edit_prompt(f"{split}-edit-{number}", drawn)

    return _distinct(text, count) + _distinct(edit, count)


def knowledge_prompts(per_kind: int, seed: int) -> list[Prompt]:
    """Named people (flat) and styles (all categories), `per_kind` of each person and style."""
    rng = np.random.default_rng(seed)
    prompts = []
    # In rounds over people and styles, so that the first few prompts already show them all.
    for k in range(per_kind):
        for name in PEOPLE:
            scene = sample_scene(rng, person=name, style="flat")
            prompts.append(scene_prompt(f"person-{name}-{k}", scene, rng, "person"))
        for style in STYLES[1:]:
            for half in range(2):
                category = CATEGORIES[(2 * k + half) % len(CATEGORIES)]
                scene = sample_scene(rng, category=category, style=style)
                prompts.append(scene_prompt(f"style-{style}-{2 * k + half}", scene, rng, "style"))
    return prompts


def reminders(knowledge: Sequence[Prompt], per_kind: int, seed: int) -> list[Prompt]:
    """Knowledge prompts whose scenes are not held out, with no scene and no text of `knowledge`."""
    scenes = [prompt.facts for prompt in knowledge]
    texts = {prompt.text for prompt in knowledge}
    return [
        replace(prompt, id=f"reminder-{prompt.id}")
        for prompt in knowledge_prompts(per_kind, seed)
        if prompt.facts not in scenes
        and prompt.text not in texts
        and not is_held_out(Scene.from_json(prompt.facts))
    ]


def pictures(per_task: int, seed: int) -> list[Prompt]:
    """Held-out prompts with flawless pictures as their targets."""
    return [
        replace(prompt, target=encode_png(Image.fromarray(to_bytes(render(_answer(prompt))))))
        for prompt in world_prompts("picture", per_task, seed, is_held=True)
    ]


def _answer(prompt: Prompt) -> Scene:
    is_edit = prompt.task == "edit"
    return Edit.from_json(prompt.facts).target if is_edit else Scene.from_json(prompt.facts)


def prompt_sets() -> dict[str, list[Prompt]]:
    """Every set that ships with the package, by file name."""
    knowledge = knowledge_prompts(24, seed=103)
    return {
        "train": world_prompts("train", 480, seed=101, is_held=False),
        "held-out": world_prompts("held", 128, seed=102, is_held=True),
        "knowledge": knowledge,
        "reminders": reminders(knowledge, 12, seed=104),
        "pictures": pictures(32, seed=105),
    }
