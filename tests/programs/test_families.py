"""Every family trains: teachers by each algorithm, a student, a LoRA, from one recipe."""

import ast
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.family_recipes import DRAW, recipe

from burnish import checkpoint, cli, images, jobs, runtime
from burnish.adapters import read_adapter
from burnish.config import ConfigError, located, parse
from burnish.evaluation import HEADLINE
from burnish.exporting import deployed_model
from burnish.jobs import run_job
from burnish.model_card import Terms, model_card
from burnish.pages.galleries import galleries
from burnish.pipeline_folders import check_kin
from burnish.planning.forecast import forecast
from burnish.policies.parts.pipelines import PipelinePolicy
from burnish.policy_config import PolicyConfig, load_policy
from burnish.preflight import check_inputs, check_recipe
from burnish.prompts import read_prompts, write_prompts
from burnish.rewards.base import ByTask
from burnish.rewards.oracle import Oracle, OracleConfig
from burnish.run_config import RunConfig
from burnish.run_folder import all_scores, is_complete
from burnish.shelves import families, policy_class
from burnish.summary import summarise
from burnish.tracking import Run, RunError, read_rows
from burnish.types import Failed, Prompt, ScoreRequest

# Stages of a step teach nobody anything.
pytestmark = pytest.mark.filterwarnings("ignore::burnish.fixed_states.FixedStatesWarning")


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("family", families())
def test_a_family_goes_from_teachers_to_a_student(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    policy_class(family).tiny().save(model)
    config = recipe(family, model)
    check_inputs(config)
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
    trained = [job for job in config.jobs() if job.startswith("train/")]
    for job in (*trained, "measure/student"):
        run_job(config, tmp_path / "run", job, rt)
    stages = tmp_path / "run" / "stages"
    for name in config.stages:
        rows = [json.loads(row) for row in (stages / name / "metrics.jsonl").open()]
        assert rows and all(math.isfinite(row["loss"]) for row in rows)
    _check_lora(family, model, stages / "student")
    scores = (tmp_path / "run/evaluation/student/scores.jsonl").read_text()
    assert scores.count("composite") == 4 * len(policy_class(family).tasks)


@torch.no_grad()
def _check_lora(family: str, base: Path, stage: Path) -> None:
    """The pipeline's own loader makes of the base what was trained."""
    kind = policy_class(family)
    loaded, trained = kind.load(base, resolution=64), kind.load(stage / "model", resolution=64)
    before = {name: value.clone() for name, value in loaded.transformer.state_dict().items()}
    loaded.pipeline.load_lora_weights(stage / "lora")
    loaded.pipeline.fuse_lora()
    loaded.pipeline.unload_lora_weights()
    for name, wanted in trained.transformer.state_dict().items():
        torch.testing.assert_close(loaded.transformer.state_dict()[name], wanted)
    assert any(not torch.equal(before[n], w) for n, w in trained.transformer.state_dict().items())


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("family", families())
def test_a_lora_is_trained_beside_rounded_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that saves memory: start and teacher borrow the weights, and nothing copies them;
    prompts are read once for both stages."""
    monkeypatch.setattr(PipelinePolicy, "sibling", None)
    model, task = tmp_path / "model", policy_class(family).tasks[0]
    policy_class(family).tiny().save(model)
    data = recipe(family, model).model_dump()
    stages = {name: data["stages"][name] for name in ("grpo_teacher", "student")}
    stages["grpo_teacher"]["lora"] = {"rank": 2}
    stages["grpo_teacher"]["algorithm"]["kl_weight"] = 0.1
    stages["student"]["algorithm"]["teachers"] = {task: {"path": "stage:grpo_teacher"}}
    stages["student"]["prompts"]["tasks"] = [task]
    stages["student"]["optimizer"] |= {"kind": "adamw_8bit", "ema_decay": 0.5}
    policy = data["policy"] | {"dtype": "bfloat16", "checkpointing": True, "offload": True}
    policy["cache"] = str(tmp_path / "cache")
    config = parse(RunConfig, data | {"policy": policy, "stages": stages})
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
    for job in ("train/grpo_teacher", "train/student"):
        run_job(config, tmp_path / "run", job, rt)
    for name in config.stages:
        stage = tmp_path / "run" / "stages" / name
        found = checkpoint.latest(stage / "checkpoints")
        assert found is not None
        assert {t.dtype for t in found.tensors["policy"].values()} == {torch.float32}
        learnt = read_adapter(stage / "lora")
        assert read_adapter(stage).keys() == learnt.keys()
        assert any(float(adapter.high.abs().max()) > 0 for adapter in learnt.values())
        written = load_file(stage / "model/transformer/diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("family", families())
def test_whole_weights_are_trained_beside_rounded_parts(family: str, tmp_path: Path) -> None:
    """Encoders, VAE, the start and the teacher are rounded, and nothing that is written."""
    model, task = tmp_path / "model", policy_class(family).tasks[0]
    policy_class(family).tiny().save(model)
    data = recipe(family, model).model_dump()
    stages = {name: data["stages"][name] for name in ("grpo_teacher", "student")}
    stages["grpo_teacher"]["algorithm"]["kl_weight"] = 0.1
    stages["student"]["algorithm"]["teachers"] = {task: {"path": "stage:grpo_teacher"}}
    stages["student"]["prompts"]["tasks"] = [task]
    del stages["student"]["lora"]
    policy = data["policy"] | {"frozen_dtype": "bfloat16"}
    config = parse(RunConfig, data | {"policy": policy, "stages": stages})
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
    for job in ("train/grpo_teacher", "train/student"):
        run_job(config, tmp_path / "run", job, rt)
    for name in config.stages:
        folder = tmp_path / "run" / "stages" / name / "model"
        for part in ("transformer", "vae"):
            file = f"{part}/diffusion_pytorch_model.safetensors"
            written, start = load_file(folder / file), load_file(model / file)
            assert {t.dtype for t in written.values() if t.is_floating_point()} == {torch.float32}
            assert all(torch.equal(written[n], t) for n, t in start.items()) == (part == "vae")
    assert load_policy(config.policy, model, rt).sibling().dtype == torch.bfloat16


@pytest.mark.parametrize("family", families())
def test_a_recipe_of_stages_may_be_spread(family: str, tmp_path: Path) -> None:
    """A student's teachers, which get their guidance from their stages, included."""
    policy_class(family).tiny().save(tmp_path)
    own = {"family": family, "path": str(tmp_path), "resolution": 64, "share_prefix": False}
    spread = {"processes": 2, "sharding": "full", "device": "cpu"}
    check_inputs(recipe(family, tmp_path, policy=own, runtime=spread))


def test_rounded_weights_are_not_trained_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need a LoRA .* set stages\.grpo_teacher\.lora\.rank"):
        recipe("qwen_image21", tmp_path, policy={"path": str(tmp_path), "dtype": "bfloat16"})


def with_another_source(prompts: list[Prompt]) -> list[Prompt]:
    """Edits that also have the source of the next one."""
    others = [*prompts[1:], prompts[0]]
    pairs = zip(prompts, others, strict=True)
    return [replace(own, sources=own.sources + other.sources) for own, other in pairs]


def edits(name: str, count: int) -> list[Prompt]:
    every = read_prompts(located(f"embedded:prompts/{name}.jsonl"))
    return [prompt for prompt in every if prompt.task == "edit"][:count]


def recipe_of_edits(family: str, model: Path, path: Path) -> RunConfig:
    """A teacher of edits on a set of prompts, which also measures."""
    stage = {
        "steps": 2,
        "prompts_per_step": 2,
        "rewards": {"truth": {"kind": "oracle"}},
        "prompts": {"path": str(path), "tasks": ["edit"]},
        "rollout": {**DRAW, "num_steps": 4, "window": 1, "keep": "window"},
        "algorithm": {"kind": "grpo"},
    }
    plan = {"prompts": str(path), "num_prompts": 2, "knowledge": None, "num_steps": 2}
    return recipe(family, model, stages={"edit_teacher": stage}, evaluation=plan)


def test_a_judge_that_is_gone_ends_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it is measured again."""
    policy_class("stable_diffusion3").tiny().save(tmp_path / "model")
    config = recipe("stable_diffusion3", tmp_path / "model")
    gone = Failed(reason="the server is gone")
    monkeypatch.setattr(Oracle, "score", lambda self, requests: [gone] * len(requests))
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(RunError, match=r"of base, got failures for 4 of 4 \(the server is gone\)"):
        run_job(config, tmp_path / "run", "measure/base", rt)
    assert not is_complete(tmp_path / "run", "measure/base")


def distilled(model: Path, **algorithm: Any) -> RunConfig:
    """A student of edits, whose teacher is its start."""
    stage = recipe("flux2_klein", model).model_dump()["stages"]["student"]
    stage["prompts"]["tasks"] = ["edit"]
    teachers = {"edit": {"path": str(model), "guidance_scale": 2.0}}
    stage["algorithm"] |= {"teachers": teachers, **algorithm}
    return recipe("flux2_klein", model, stages={"student": stage})


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize(
    "family", [name for name in families() if policy_class(name).max_sources > 1]
)
def test_prompts_of_two_sources_are_drawn_scored_trained_on_and_shown(
    family: str, tmp_path: Path
) -> None:
    model, path = tmp_path / "model", tmp_path / "two.jsonl"
    policy = policy_class(family).tiny()
    policy.save(model)
    # Beside edits of one source, in one step.
    write_prompts(path, [*with_another_source(edits("train", 4)), *edits("held-out", 4)])
    config = recipe_of_edits(family, model, path)
    check_inputs(config)
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
    for job in ("measure/base", "train/edit_teacher", "measure/edit_teacher"):
        run_job(config, tmp_path / "run", job, rt)
    file = tmp_path / "run/stages/edit_teacher/metrics.jsonl"
    metrics = [json.loads(row) for row in file.read_text().splitlines()]
    # Pictures of random weights may all score alike: such a step has nothing to learn.
    learnt = [row for row in metrics if row["data/trained"]]
    assert len(metrics) == 2 and learnt and all(math.isfinite(row["loss"]) for row in learnt)
    # Training finds the log-probabilities of the rollout again, whatever the mixture of sources.
    assert learnt[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    gallery, *_ = galleries(config, tmp_path / "run", all_scores(config, tmp_path / "run"), 1)
    ((_, rows), *_) = gallery["groups"]
    assert len(rows[0]["sources"]) == 2 and all(shot["picture"] for shot in rows[0]["shots"])


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("family", families())
def test_prompts_of_several_shapes_are_drawn_scored_trained_on_and_measured(
    family: str, small_judge: Path, tmp_path: Path
) -> None:
    model, task = tmp_path / "model", policy_class(family).tasks[0]
    policy_class(family).tiny().save(model)
    # An edit's shape is that of its source, unless it says another.
    wide = images.encode_png(Image.new("RGB", (128, 64), (200, 30, 30)))
    shapes = ("1:1", "2:1", "1:2", None) * 2
    sources = (wide,) if task == "edit" else ()
    for name, text in (("train", "a cat"), ("held-out", "a dog")):
        prompts = [
            Prompt(id=f"{name}{row}", text=text, task=task, aspect=aspect, sources=sources)
            for row, aspect in enumerate(shapes)
        ]
        write_prompts(tmp_path / f"{name}.jsonl", prompts)
    config = recipe_of_shapes(family, model, tmp_path, small_judge)
    check_inputs(config)
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
    run = tmp_path / "run"
    for job in ("train/grpo_teacher", "train/student", "measure/student"):
        run_job(config, run, job, rt)
    teacher, student = (
        [json.loads(row) for row in (run / f"stages/{name}/metrics.jsonl").open()]
        for name in config.stages
    )
    assert all(math.isfinite(row["loss"]) for row in (*teacher, *student))
    # Training finds the log-probabilities of the rollout again, whatever the mixture of shapes.
    assert teacher[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    drawn = run / "evaluation/student/pictures"
    last = (96, 32) if task == "edit" else (64, 64)
    for prompt, size in zip(prompts, [(64, 64), (96, 32), (32, 96), last] * 2, strict=True):
        assert images.read(drawn / f"{prompt.id}.webp").size == size
    rows = read_rows(run / "evaluation/student/scores.jsonl")
    assert {row["prompt"] for row in rows} == {prompt.id for prompt in prompts}
    assert sum(row["metric"] == "diversity" for row in rows) == len(prompts)
    # Whatever the judge is, its score is what the run is told by.
    said = {row["prompt"]: row["value"] for row in rows if row["metric"] == HEADLINE}
    assert said.keys() == {prompt.id for prompt in prompts}
    assert all(1 <= value <= 5 for value in said.values())
    summary = summarise(config, run, rows)
    (result,) = [one for one in summary["results"] if one["policy"] == "student"]
    assert summary["headline"] == "alignment" and 1 <= result["score"]["mean"] <= 5


def recipe_of_shapes(family: str, model: Path, folder: Path, judge: Path) -> RunConfig:
    """A guarded teacher and a student of the first task, on prompts of several shapes."""
    reward = {"kind": "vlm", "path": str(judge), "dimension": "alignment"}
    data = recipe(family, model).model_dump()
    stages = {name: data["stages"][name] for name in ("grpo_teacher", "student")}
    task, held_out = policy_class(family).tasks[0], str(folder / "held-out.jsonl")
    for stage in stages.values():
        stage["prompts"] |= {"path": str(folder / "train.jsonl"), "tasks": [task]}
        stage["prompts_per_step"] = 4
    stages["grpo_teacher"] |= {
        "rewards": {"judge": reward},
        "guard": {
            "judge": reward,
            "every": 1,
            "prompts": held_out,
            "num_prompts": 8,
            "action": "warn",
        },
        "optimizer": {"num_updates": 1},
    }
    stages["student"]["algorithm"]["teachers"] = {task: {"path": "stage:grpo_teacher"}}
    return parse(
        RunConfig,
        data
        | {
            "policy": data["policy"] | {"aspects": ["1:1", "2:1", "1:2"]},
            "stages": stages,
            "judge": reward,
            "evaluation": data["evaluation"] | {"prompts": held_out, "num_prompts": 8},
        },
    )


def test_a_judge_on_a_gpu_is_planned_there_and_needs_a_run_that_is(
    small_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_class("stable_diffusion3").tiny().save(tmp_path)
    judge = {"kind": "vlm", "path": str(small_judge), "dimension": "alignment"}

    def judged(device: str) -> RunConfig:
        data = recipe("stable_diffusion3", tmp_path, judge=judge | {"device": device}).model_dump()
        data["stages"] = {"nft_teacher": data["stages"]["nft_teacher"]}
        data["stages"]["nft_teacher"]["rewards"] = {"judge": judge | {"device": device}}
        return parse(RunConfig, data | {"runtime": {"device": "cpu"}})

    for device in ("cpu", "cuda"):
        for plan in forecast(judged(device), "cuda"):
            places = {"cpu": plan.host, "cuda": plan.parts}
            told = {place: [p.name for p in parts] for place, parts in places.items()}
            found = [place for place in told if f"judge {small_judge}" in told[place]]
            assert found == [device], plan.stage
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="judge: need a run on a GPU for device=cuda"):
        check_inputs(judged("cuda"))


def test_more_sources_than_a_family_reads_are_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (own,) = edits("train", 1)
    many = replace(own, id="many", sources=own.sources * 5)
    fine = [replace(prompt, id=prompt.id) for prompt in edits("train", 4)]
    path, plain = tmp_path / "many.jsonl", tmp_path / "plain.jsonl"
    write_prompts(path, [*fine, many])
    write_prompts(plain, fine)
    said = r"need at most 4 source images of a prompt for flux2_klein, got 5 of 'many'"
    with pytest.raises(ConfigError, match=rf"^evaluation\.prompts: {said}"):
        check_inputs(recipe_of_edits("flux2_klein", tmp_path, path))
    config = recipe_of_edits("flux2_klein", tmp_path, path)
    plan = config.evaluation.model_copy(update={"prompts": str(plain)})
    with pytest.raises(ConfigError, match=rf"^stages\.edit_teacher\.prompts: {said}"):
        check_inputs(config.model_copy(update={"evaluation": plan}))


def test_sources_that_a_family_cannot_read_are_told_before_it_is_read(tmp_path: Path) -> None:
    """Of the model there is only its index."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    small, flat = (
        images.encode_png(Image.new("RGB", size)) for size in ((200, 63), (64 * 8 + 1, 64))
    )
    for source, size in ((small, "200 x 63"), (flat, "513 x 64")):
        own = [replace(prompt, sources=(source,)) for prompt in edits("train", 4)]
        write_prompts(tmp_path / "own.jsonl", own)
        config = recipe_of_edits("flux2_klein", tmp_path, tmp_path / "own.jsonl")
        said = rf"need source images of 64 pixels .*got {size}"
        with pytest.raises(ConfigError, match=said):
            check_inputs(config)
        # Likewise where a student is compared with its teachers.
        states = {"prompts": str(tmp_path / "own.jsonl")}
        key = r"stages\.student\.algorithm\.fixed_states\.prompts"
        with pytest.raises(ConfigError, match=f"^{key}: {said}"):
            check_inputs(distilled(tmp_path, fixed_states=states))


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "need the Qwen2Tokenizer"),
    "empty tokenizer": (
        lambda m: [file.unlink() for file in (m / "tokenizer").iterdir()] and None,
        "need the Qwen2Tokenizer",
    ),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "need the FlowMatchEuler"),
    "no weights": (
        lambda m: (m / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "need weights as safetensors in .*vae, got no file",
    ),
    "cut off": (
        lambda m: os.truncate(m / "transformer/diffusion_pytorch_model.safetensors", 5000),
        "need readable weights in .*transformer",
    ),
    "broken settings": (
        lambda m: (m / "vae/config.json").write_text("{") and None,
        "need JSON in .*vae/config",
    ),
    "settings of another part": (
        lambda m: shutil.copy(m / "transformer/config.json", m / "vae/config.json") and None,
        "need the settings of AutoencoderKLFlux2 in .*, got those of Flux2Transformer2DModel",
    ),
    "broken index": (
        lambda m: (m / "model_index.json").write_text("[") and None,
        "need JSON in .*model_index",
    ),
    "strange index": (
        lambda m: (m / "model_index.json").write_text("[]") and None,
        "need keys and values in .*model_index",
    ),
}


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    policy_class("flux2_klein").tiny().save(folder)
    return folder


@pytest.mark.parametrize("name", BREAKS)
def test_a_part_that_is_missing_or_broken_is_told_before_it_is_read(
    name: str, whole_model: Path, tmp_path: Path
) -> None:
    """Without its tokenizer a pipeline may load, and take every word for an unknown one."""
    model = shutil.copytree(whole_model, tmp_path / "model")
    check_recipe(recipe("flux2_klein", model))
    breaking, said = BREAKS[name]
    breaking(model)
    with pytest.raises(ConfigError, match=rf"^policy\.path: {said}"):
        check_recipe(recipe("flux2_klein", model))
    with pytest.raises(ConfigError, match=said):
        deployed_model(str(model))


@pytest.mark.parametrize("away", ["", "blurry"])
@pytest.mark.parametrize("family", families())
def test_a_card_calls_the_pipeline_as_it_can_be_called(
    family: str, away: str, tmp_path: Path
) -> None:
    """Of a stage that draws with guidance, and of a student, which has no say of a negative one."""
    own = policy_class(family)
    data = recipe(family, tmp_path).model_dump()
    data["stages"]["nft_teacher"]["rollout"]["negative_prompt"] = away
    config = parse(RunConfig, data)
    Run.create(tmp_path / "run", config)
    known = inspect.signature(vars(own.pipeline_class)["__call__"]).parameters
    for policy, guided in (("nft_teacher", True), ("student", False)):
        card = model_card(config, tmp_path / "run", policy, terms=Terms("mit"), family=own)
        code = card.split("```python")[1].split("```")[0]
        call = next(
            node
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline"
        )
        given = {keyword.arg for keyword in call.keywords}
        assert given <= known.keys() and own.guidance_argument in given
        assert ("blurry" in code) == (guided and away == "blurry")
        assert ("guidance of its teachers" in card) == (policy == "student")


def test_settings_of_an_older_file_are_no_other_base(tmp_path: Path) -> None:
    """It lacks what was added later and is the default; another value is another base."""
    (tmp_path / "old").mkdir()
    policy_class("flux2_klein").tiny().save(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
    file = tmp_path / "old" / "scheduler" / "scheduler_config.json"
    facts = json.loads(file.read_text())
    del facts["use_beta_sigmas"]
    file.write_text(json.dumps(facts))
    check_kin("teacher", tmp_path / "new", tmp_path / "old")
    file.write_text(json.dumps(facts | {"shift": 7.5}))
    with pytest.raises(ConfigError, match=r"another scheduler in .*new \(shift\)"):
        check_kin("teacher", tmp_path / "new", tmp_path / "old")


def test_only_judges_that_are_needed_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_class("flux2_klein").tiny().save(tmp_path)
    asked: list[str] = []
    for number, dimension in enumerate(("alignment", "quality")):
        own = {"kind": "oracle", "dimension": dimension}
        config = recipe("flux2_klein", tmp_path, judge=own)
        monkeypatch.setattr(OracleConfig, "meet", lambda self: asked.append(self.dimension))
        check_inputs(config, [] if number else ["measure/base"])
    assert asked == ["alignment"]
    check_inputs(config, ["train/nft_teacher"])
    assert asked == ["alignment", "composite"]


def test_a_path_that_is_no_folder_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="hf download black-forest-labs/FLUX --local-dir DIR"):
        check_recipe(recipe("flux2_klein", Path("black-forest-labs/FLUX")))
    with pytest.raises(ConfigError, match="a single file has no encoders"):
        check_recipe(recipe("flux2_klein", tmp_path / "model.safetensors"))


@pytest.mark.parametrize("family", families())
def test_a_folder_is_drawn_from_by_the_family_that_reads_it(family: str, tmp_path: Path) -> None:
    index = {"_class_name": policy_class(family).pipeline_class.__name__}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert deployed_model(str(tmp_path))[1].policy.family == family


def test_as_many_processes_as_the_recipe_says(tmp_path: Path) -> None:
    policy_class("flux2_klein").tiny().save(tmp_path / "model")
    config = recipe("flux2_klein", tmp_path / "model", runtime={"processes": 2, "device": "cpu"})
    with pytest.raises(ConfigError, match=r"need 2 processes .*got 1; start them with torchrun"):
        run_job(config, tmp_path / "run", "train/grpo_teacher", runtime.ALONE)


def test_what_only_draws_is_read_as_it_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the precision of the matrix products; what is trained keeps its own."""
    config = recipe("flux2_klein", tmp_path)
    asked: list[str] = []

    class Enough(Exception):
        pass

    def note(settings: PolicyConfig, *_: Any) -> Any:
        asked.append(settings.dtype)
        raise Enough

    monkeypatch.setattr(jobs, "load_policy", note)
    for dtype in (torch.float32, torch.bfloat16):
        rt = replace(runtime.ALONE, dtype=dtype)
        for job in ("measure/base", "train/grpo_teacher"):
            with pytest.raises(Enough):
                run_job(config, tmp_path / str(dtype), job, rt)
    assert asked == ["float32", "float32", "bfloat16", "float32"]
    rounded = config.policy.model_copy(update={"dtype": "bfloat16"})
    assert rounded.drawing(torch.float32) == rounded


def test_edits_may_have_a_judge_of_their_own(tmp_path: Path) -> None:
    config = recipe("flux2_klein", tmp_path, edit_judge={"kind": "oracle", "dimension": "quality"})
    assert [judge.dimension for judge in config.judges.values()] == ["composite", "quality"]
    asked = [
        ScoreRequest(prompt=prompt, image=torch.full((3, 64, 64), 0.5))
        for prompt in [
            *edits("train", 2),
            *read_prompts(located("embedded:prompts/train.jsonl"))[:2],
            *edits("train", 1),
        ]
    ]
    found = ByTask(config.judges).score(asked)
    by_task = {task: judge.build() for task, judge in config.judges.items()}
    assert found == [by_task[one.prompt.task].score([one])[0] for one in asked]
    assert "edit_judge" in dict(config.scorers())


def test_a_model_of_another_family_is_told_before_it_is_read(tmp_path: Path) -> None:
    def index(name: str, **facts: Any) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **facts}))

    index("Flux2KleinPipeline")
    with pytest.raises(ConfigError, match=r"got a Flux2KleinPipeline .*policy\.family=flux2_klein"):
        check_inputs(recipe("qwen_image21", tmp_path))
    index("StableCascadePipeline")
    with pytest.raises(ConfigError, match=r"families are .*flux2_klein.*docs/extend\.md"):
        check_inputs(recipe("flux2_klein", tmp_path))
    index("Flux2KleinPipeline", is_distilled=True)
    with pytest.raises(ConfigError, match=r"evaluation\.guidance_scale: need guidance_scale=1"):
        check_inputs(recipe("flux2_klein", tmp_path))


def test_steps_that_a_pipeline_does_not_take_are_told_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would draw by its own grid what was measured in other steps."""
    grid = [1 - step / 8 for step in range(8)]
    index = {"_class_name": "QwenImage21Pipeline", "sample_sigmas": grid}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"evaluation\.num_steps: need 8 steps .*got 2; take 8"):
        check_inputs(recipe("qwen_image21", tmp_path))
    assert deployed_model(str(tmp_path))[1].num_steps == 8
    assert cli.main(["sample", "a cat", "--model", str(tmp_path), "--steps", "4"]) == 2
    assert "got 4; take 8" in capsys.readouterr().err


def test_a_size_that_the_model_cannot_draw_is_told_before_it_is_read(tmp_path: Path) -> None:
    policy_class("stable_diffusion3").tiny().save(tmp_path)
    policy = {"family": "stable_diffusion3", "path": str(tmp_path), "resolution": 256}
    check_inputs(recipe("stable_diffusion3", tmp_path, policy=policy))
    wide = recipe("stable_diffusion3", tmp_path, policy=policy | {"aspects": ["1:1", "4:1"]})
    with pytest.raises(ConfigError, match=r"policy: need sides of at most 256 .*512 x 128"):
        check_inputs(wide)


def test_a_task_that_the_family_cannot_do_is_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    config = recipe("stable_diffusion3", tmp_path)
    stage = config.stages["grpo_teacher"]
    prompts = stage.prompts.model_copy(update={"tasks": ("t2i", "edit")})
    stages = {"grpo_teacher": stage.model_copy(update={"prompts": prompts})}
    with pytest.raises(ConfigError, match=r"need t2i for .*stable_diffusion3, got edit"):
        check_inputs(config.model_copy(update={"stages": stages}))
