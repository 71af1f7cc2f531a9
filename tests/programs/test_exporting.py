"""A model for others: what is written draws what was trained, and the card says what it is."""

import inspect
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from burnish import cli, exporting, images, runtime
from burnish.config import ConfigError, parse
from burnish.jobs import run_job
from burnish.model_card import Terms
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.policy_config import load_policy
from burnish.run_config import RunConfig
from burnish.summary import read_run
from burnish.tracking import Run, RunError

pytestmark = pytest.mark.filterwarnings("ignore::burnish.fixed_states.FixedStatesWarning")

ROLLOUT = {"num_steps": 3, "group_size": 4, "window": 0, "keep": "none", "guidance_scale": 2.0}
STAGE: dict[str, Any] = {
    "steps": 2,
    "prompts_per_step": 2,
    "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"], "limit": 8},
    "rollout": ROLLOUT,
    "rewards": {"truth": {"kind": "oracle", "weights": {"default": 1.0}}},
    "algorithm": {"kind": "nft"},
    "optimizer": {"num_updates": 1, "micro_batch": 16, "learning_rate": 0.01},
    "lora": {"rank": 2},
}
STUDENT: dict[str, Any] = {
    **{key: value for key, value in STAGE.items() if key not in ("rewards", "lora")},
    "rollout": {**ROLLOUT, "guidance_scale": 1.0, "keep": 2},
    "algorithm": {"kind": "distill", "teachers": {"t2i": {"path": "stage:teacher"}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages are trained and not measured."""
    folder = tmp_path_factory.mktemp("run") / "small"
    base = folder.parent / "base"
    QwenImage21Policy.tiny().save(base)
    config = parse(
        RunConfig,
        {
            "name": "small",
            "policy": {"path": str(base), "resolution": 64, "frozen_dtype": "bfloat16"},
            "stages": {
                "teacher": STAGE,
                "student": STUDENT,
                "after": {**STAGE, "start": "soup"},
                "later": STAGE,
            },
            "merges": {"soup": {"method": "average", "of": ["teacher", "student"]}},
            "judge": {"kind": "oracle"},
            "evaluation": {"num_steps": 2},
        },
    )
    Run.create(folder, config, command="test", environment={})
    for job in ("train/teacher", "train/student", "merge/soup", "train/after"):
        run_job(config, folder, job, runtime.ALONE)
    return folder


def plain(folder: Path) -> Any:
    """The pipeline as a user without Burnish reads it."""
    # Here, because it must come after what Burnish does for torchvision.
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


def drawn(pipeline: Any) -> Tensor:
    """By the call of the card, nothing but the prompt and the size given."""
    generator = torch.Generator().manual_seed(0)
    found = pipeline(
        "a large red circle", num_inference_steps=2, height=64, width=64, output_resolution=64,
        generator=generator, output_type="latent",
    )  # fmt: skip
    return found.images


def test_a_student_is_a_pipeline_that_draws_at_guidance_1_by_default(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    command = ["export", str(run / "student"), "--licence", "apache-2.0", "--out", str(out)]
    assert cli.main(command) == 0
    assert str(out / "README.md") in capsys.readouterr().out
    fresh = plain(out)
    default = inspect.signature(fresh.__call__).parameters["true_cfg_scale"].default
    assert default == 1.0
    trained = QwenImage21Policy.load(run / "stages" / "student" / "model", resolution=64)
    assert torch.equal(drawn(fresh), drawn(trained.pipeline))
    base = QwenImage21Policy.load(run.parent / "base", resolution=64)
    assert not torch.allclose(drawn(fresh), drawn(base.pipeline), atol=1e-3)
    assert "output_resolution=64" in (out / "README.md").read_text()
    # `burnish sample` draws an export as it is deployed, as it does a stage of a run.
    sheets = []
    for model in (out, run / "student"):
        sheets.append(tmp_path / f"{len(sheets)}.png")
        asked = ["sample", "a large red circle", "--model", str(model), "--count", "1"]
        assert cli.main([*asked, "--out", str(sheets[-1])]) == 0
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_a_lora_changes_a_fresh_base_to_the_teacher(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    # The folder of the stage serves as well as RUN/STAGE.
    assert cli.main(["export", str(run / "stages" / "teacher"), "--lora", "--out", str(out)]) == 0
    base = plain(run.parent / "base")
    before = drawn(base)
    base.load_lora_weights(out)
    trained = QwenImage21Policy.load(run / "stages" / "teacher" / "model", resolution=64)
    torch.testing.assert_close(drawn(base), drawn(trained.pipeline), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(drawn(base), before, atol=1e-3)


def test_a_lora_is_right_on_a_device_that_draws_rounded(run: Path) -> None:
    """The stage's weights are rounded once, after the LoRA was added; so must those be that a fresh
    base and the LoRA make."""
    config, teacher = read_run(run), run / "stages" / "teacher"
    rt = replace(runtime.ALONE, dtype=torch.bfloat16)
    asked = (config, "teacher", teacher / "model", teacher / "lora", rt)
    exporting.check_export(*asked, as_lora=True)


def test_the_card_says_what_the_model_is(run: Path, tmp_path: Path) -> None:
    rt = runtime.start()
    found = {
        name: ModelCard.load(exporting.export(run, name, tmp_path / name, rt, terms=Terms("mit"))
                             / "README.md")
        for name in ("teacher", "student", "soup", "after")
    }  # fmt: skip
    for name, card in found.items():
        assert card.data.to_dict() == {
            "library_name": "diffusers", "license": "mit", "pipeline_tag": "text-to-image",
            "tags": ["burnish"],
        }  # fmt: skip
        # Nobody else has its folder.
        assert "`BASE` stands for the model" in card.text and str(run.parent) not in card.text
        assert card.text.strip().startswith(f"# small: {name}")
        assert "missing" in card.text and "None" not in card.text.split("```yaml")[0]
    student, teacher, soup = (found[name].text for name in ("student", "teacher", "soup"))
    code = student.split("```yaml")[0]
    assert "true_cfg_scale=1," in code and "negative_prompt" not in code
    assert 'true_cfg_scale=2,\n    negative_prompt=" ",' in teacher
    assert "a negative prompt has no place" in student
    for text in (student, soup):
        assert "- **teacher**: nft from base, 2 steps of 2 prompts, 4 pictures each" in text
        assert "a LoRA of rank 2" in text and "reward truth: oracle, no files" in text
    assert "  - teacher of t2i: teacher" in student and "- **soup**: average of" in soup
    assert "**soup**" not in student and "**student**" not in teacher
    after = found["after"].text
    assert "Reinforcement learning (nft) from `soup`" in after
    assert [after.index(f"- **{name}**") for name in ("teacher", "student", "soup", "after")] == (
        sorted(after.index(f"- **{name}**") for name in ("teacher", "student", "soup", "after"))
    )
    assert "The oracle of the embedded world was a training reward" in teacher


def test_the_hub_takes_the_facts_of_a_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, link = tmp_path / "out", "https://example.org/LICENSE.md"
    command = ["export", str(run / "teacher"), "--lora", "--out", str(out)]
    for wrong, said in (
        (["--licence", "flux-non-commercial"], "add --licence-link URL for another one"),
        (["--base-model", str(run.parent / "base")], "need the base as ORG/NAME of the hub, got"),
        (["--base-model", "model"], "need the base as ORG/NAME of the hub, got 'model'"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err and not out.exists()
    licence = ["--licence", "flux-non-commercial", "--licence-link", link]
    assert cli.main([*command, *licence, "--base-model", "acme/tiny"]) == 0
    card = ModelCard.load(out / "README.md")
    found = card.data.to_dict()
    assert found["license"] == "other" and found["base_model"] == "acme/tiny"
    assert (found["license_name"], found["license_link"]) == ("flux-non-commercial", link)
    assert 'from_pretrained("acme/tiny")' in card.text and "`BASE`" not in card.text
    assert str(run.parent) not in (out / exporting.DEPLOYED).read_text()


def test_pictures_of_base_and_model_stand_beside_the_card(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    for name in ("base", "student"):
        place = copy / "evaluation" / name / "pictures"
        place.mkdir(parents=True)
        for number in range(20):
            images.to_pil(torch.rand(3, 64, 64)).save(place / f"p{number}.webp")
    out = exporting.export(copy, "student", tmp_path / "out", runtime.start(), terms=Terms("mit"))
    assert images.read(out / "samples.png").size == (8 * 66 - 2, 2 * 66 - 2)
    assert "![The base above, this model below](samples.png)" in (out / "README.md").read_text()


def test_one_pipeline_at_a_time_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device that trained one may have no room for two."""
    seen: list[weakref.ref[Any]] = []

    def load_alone(*settings: Any) -> Any:
        assert all(one() is None for one in seen)
        found = load_policy(*settings)
        seen.extend(weakref.ref(network) for network in found.networks().values())
        return found

    monkeypatch.setattr(exporting, "load_policy", load_alone)
    rt, out = runtime.start(), tmp_path / "out"
    exporting.export(run, "student", out, rt, terms=Terms("mit"))
    assert len(seen) == 3 * 4, "three networks: what is written, what it is compared with"


def test_an_export_that_draws_something_else_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = QwenImage21Policy.load(run.parent / "base", resolution=64)
    monkeypatch.setattr(
        QwenImage21Policy, "save", lambda self, folder: base.pipeline.save_pretrained(folder)
    )
    with pytest.raises(RunError, match="need an export that draws what student draws"):
        exporting.export(run, "student", tmp_path / "out", runtime.start(), terms=Terms("mit"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        (
            "studnet",
            {},
            "need a stage or merge of .*; take one of teacher, student, after, later, soup",
        ),
        ("later", {}, "need a stage that is complete, later"),
        ("student", {"as_lora": True}, "need a stage that trained a LoRA, student did not"),
        ("after", {"as_lora": True}, "need a LoRA on the base, after has one on soup"),
    ],
)
def test_what_cannot_be_exported_is_told(
    policy: str, options: dict[str, bool], words: str, run: Path, tmp_path: Path
) -> None:
    rt, terms = runtime.start(), Terms("mit")
    with pytest.raises(ConfigError, match=words):
        exporting.export(run, policy, tmp_path / "out", rt, terms=terms, **options)
    with pytest.raises(ConfigError, match="need a folder that does not exist yet"):
        exporting.export(run, "teacher", tmp_path, rt, terms=terms)


def test_a_spoilt_file_of_an_export_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exporting.export(run, "student", tmp_path / "out", runtime.start(), terms=Terms("mit"))
    (out / exporting.DEPLOYED).write_text('{"guidance": 1}')
    asked = ["sample", "x", "--model", str(out), "--out", str(tmp_path / "x.png")]
    assert cli.main(asked) == 2
    assert "did you mean `guidance_scale`?" in capsys.readouterr().err
