"""The miniature: what ships is what the builder makes, and a reduced build learns."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from burnish import runtime
from burnish.annotations.base import read_annotations
from burnish.cli import main
from burnish.config import located
from burnish.miniature.autoencoder import new_autoencoder, patches, to_input
from burnish.miniature.base_model import BasePlan, make_pool, train_base
from burnish.miniature.build import build
from burnish.miniature.linear_start import principal_components, start_linear
from burnish.miniature.pictures import FLAWED, edit_example, text_example
from burnish.miniature.prompt_sets import prompt_sets
from burnish.miniature.tokenizer import build_tokenizer
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.rewards.oracle import measures
from burnish.rewards.vlm import Judge
from burnish.rollout import draw
from burnish.types import Guidance
from burnish.world.edits import Edit
from burnish.world.flaws import PIXEL_FLAWS, spoil
from burnish.world.oracle import measure_scene
from burnish.world.render import render
from burnish.world.scenes import CATEGORIES, PEOPLE, STYLES, Scene, is_held_out, sample_scene

SHIPPED = located("embedded:weights/base")


@pytest.fixture(scope="module")
def base() -> QwenImage21Policy:
    return QwenImage21Policy.load(SHIPPED, resolution=64)


def test_the_shipped_prompt_sets_are_those_of_the_builder() -> None:
    for name, prompts in prompt_sets().items():
        assert list(read_prompts(located(f"embedded:prompts/{name}.jsonl"))) == prompts


def test_training_prompts_contain_nothing_held_out_and_held_out_prompts_do() -> None:
    for name, expected in (("train", False), ("held-out", True)):
        for prompt in read_prompts(located(f"embedded:prompts/{name}.jsonl")):
            if prompt.task == "t2i":
                assert is_held_out(Scene.from_json(prompt.facts)) == expected
            else:
                edit = Edit.from_json(prompt.facts)
                assert (is_held_out(edit.source) or is_held_out(edit.target)) == expected


def test_reminders_show_every_person_and_style_in_scenes_that_are_not_measured() -> None:
    knowledge, shown = (
        read_prompts(located(f"embedded:prompts/{name}.jsonl"))
        for name in ("knowledge", "reminders")
    )
    scenes = [Scene.from_json(prompt.facts) for prompt in shown]
    assert {scene.person for scene in scenes} >= set(PEOPLE)
    assert {scene.values["style"] for scene in scenes} == set(STYLES)
    assert not any(map(is_held_out, scenes))
    assert not any(prompt.facts == other.facts for prompt in shown for other in knowledge)
    assert not shown.shared(knowledge).entries


def test_training_pictures_are_flawed_as_often_as_said() -> None:
    rng = np.random.default_rng(0)
    for make in (text_example, edit_example):
        assert make(rng).pixels.shape == (64, 64, 3)
    assert 0.7 <= FLAWED <= 0.9


def test_the_tokenizer_is_a_function_of_its_seed_and_spells_everything() -> None:
    one, two = build_tokenizer(0), build_tokenizer(0)
    assert one.get_vocab() == two.get_vocab()
    for text in ("a small red circle", "Übung 漢字 🙂"):
        assert one.decode(one(text).input_ids) == text


def test_diffusers_draws_with_the_shipped_base_without_burnish(tmp_path: Path) -> None:
    script = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    # A CPU build of torch beside a CUDA build of torchvision: declare what the latter looks for.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from diffusers import QwenImage21Pipeline
pipe = QwenImage21Pipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a large red circle in the centre", negative_prompt=" ", true_cfg_scale=3.0,
             num_inference_steps=10, output_resolution=64,
             generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (64, 64), image.size
assert not any(name.startswith("burnish") for name in sys.modules)
image.save(sys.argv[2])
"""
    picture = tmp_path / "circle.png"
    subprocess.run(
        [sys.executable, "-c", script, str(SHIPPED), str(picture)], check=True, cwd=tmp_path
    )
    assert picture.stat().st_size > 500


def test_guidance_makes_the_base_better(base: QwenImage21Policy) -> None:
    prompts = [
        p for p in read_prompts(located("embedded:prompts/held-out.jsonl")) if p.task == "t2i"
    ]
    means = {}
    for scale in (1.0, 3.0):
        with runtime.quick().autocast():
            images = draw(
                base, prompts[:48], num_steps=10, guidance=Guidance(scale), seeds=list(range(48))
            )
        scores = [
            measures(prompt, image.permute(1, 2, 0).numpy())["composite"]
            for prompt, image in zip(prompts, images, strict=False)
        ]
        means[scale] = float(np.mean(scores))
    assert means[3.0] > means[1.0] + 0.03, means


def test_the_card_says_how_the_base_was_made() -> None:
    card = (SHIPPED / "README.md").read_text()
    facts = json.loads(card.partition("```json")[2].partition("```")[0])
    assert facts["text_examples"] > 1000 and "miniature build" in card


def test_shipped_weights_stay_small() -> None:
    total = sum(file.stat().st_size for file in located("embedded:weights").rglob("*"))
    assert total < 40e6


def test_the_autoencoder_starts_as_whitened_principal_components() -> None:
    rng = np.random.default_rng(0)
    images = to_input(np.stack([text_example(rng).pixels for _ in range(120)]))
    values = patches(images)
    found = principal_components(values, 63)
    centred = values - found.mean
    best = centred - centred @ found.directions @ found.directions.T
    vae = new_autoencoder()
    start_linear(vae, values)
    with torch.no_grad():
        latents = vae.encode(images, return_dict=False)[0].mode()
        images_again = vae.decode(latents, return_dict=False)[0]
    error = float((images_again - images).pow(2).mean().sqrt())
    # The norm is not quite constant, and the decoder clips: close to the optimum, not equal to it.
    assert error < 1.6 * float(best.pow(2).mean().sqrt())
    flat = latents.squeeze(2).transpose(0, 1).flatten(1)[:63]
    assert torch.allclose(flat.std(dim=1), torch.ones(63), atol=0.35)
    covariance = torch.corrcoef(flat) - torch.eye(63)
    assert float(covariance.abs().mean()) < 0.1


def through_autoencoder(base: QwenImage21Policy, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """What the shipped autoencoder makes of pictures, `height width 3` in [0, 1]."""
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return [i.permute(1, 2, 0).numpy() for i in base.decode(base.encode_images(images))]


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_oracle_tells_clean_from_flawed_through_the_autoencoder(
    base: QwenImage21Policy, category: str
) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, category=category, style="flat") for _ in range(12)]
    clean = [render(scene) for scene in scenes]

    def mean(pictures: list[np.ndarray], name: str) -> float:
        seen = through_autoencoder(base, pictures)
        found = [measure_scene(x, s)[name] for x, s in zip(seen, scenes, strict=True)]
        return float(np.mean(found))

    assert mean(clean, "quality") > 0.9 and mean(clean, "alignment") > 0.95
    for spoil_picture in PIXEL_FLAWS.values():
        assert mean([spoil_picture(picture) for picture in clean], "quality") < 0.3
    spoilt = [render(spoil(scene, rng)) for scene in scenes]
    assert mean(spoilt, "composite") < 0.85


def test_a_build_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [text_example(rng, str(n)) for n in range(6)]
    edits = [edit_example(rng, str(n)) for n in range(6)]
    plan = BasePlan(steps=6, batch_size=2, noise_levels=1, save_every=2)

    def trained(folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        policy = QwenImage21Policy.tiny()
        done: list[dict[str, float]] = []

        def on_step(losses: dict[str, float]) -> None:
            done.append(losses)
            if len(done) == stop_at:
                raise KeyboardInterrupt

        pools = make_pool(policy, texts), make_pool(policy, edits)
        losses = train_base(policy, *pools, plan, runtime.start(), folder=folder, on_step=on_step)
        assert losses[-len(done) :] == done and len(losses) == plan.steps
        return policy.transformer.state_dict()

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop_at=5)
    cut = trained(tmp_path / "cut")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_reduced_build_learns_and_can_be_loaded(tmp_path: Path) -> None:
    facts = build(tmp_path, quick=True)
    for name in ("autoencoder_loss", "base_loss_t2i", "base_loss_edit"):
        first, last = facts[name]
        assert last < 0.85 * first, (name, first, last)
    policy = QwenImage21Policy.load(tmp_path / "weights" / "base", resolution=64)
    (image,) = draw(
        policy,
        read_prompts(tmp_path / "prompts" / "held-out.jsonl")[:1],
        num_steps=2,
        guidance=Guidance(),
        seeds=[0],
    )
    assert image.isfinite().all()
    assert set(Judge.load(tmp_path / "weights" / "judge").rubrics) >= {"alignment", "instruction"}
    shipped = located("embedded:prompts/train.jsonl").read_bytes()
    built = (tmp_path / "prompts" / "train.jsonl").read_bytes()
    assert hashlib.sha256(built).digest() == hashlib.sha256(shipped).digest()


def test_annotated_pictures_can_be_had_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["miniature", "annotate", "--out", str(tmp_path), "--prompts", "1"]) == 0
    (path,) = [Path(line) for line in capsys.readouterr().out.splitlines() if "jsonl" in line]
    found = read_annotations(path)
    assert {a.dimension for a in found} >= {"alignment", "aesthetic", "portrait", "instruction"}
    # Two dimensions of every picture, of those that do not fit their prompt one.
    assert len({a.pair_group for a in found}) == 7 and len(found) >= 5 * (5 * 2 + 2 * 1)
