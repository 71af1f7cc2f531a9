"""Training of judges: from annotations to a folder that a reward reads, exactly resumable."""

import contextlib
import json
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from burnish import images, runtime
from burnish.annotations.base import write_annotations
from burnish.annotations.schema import Annotation
from burnish.cli import main
from burnish.config import ConfigError, located
from burnish.judges.agreement import (
    FEWEST,
    KNOTS,
    agreement,
    calibrated_apart,
    fit_calibration,
    measured,
    request_of,
)
from burnish.judges.lessons import (
    AnnotationsWarning,
    Collator,
    Curriculum,
    Lesson,
    compared,
    exercises,
    prompt_of,
    read_sources,
    spoken,
)
from burnish.judges.model import read_trainable
from burnish.judges.trainer import Objective, judge_loss
from burnish.judging import MARKER, Rubric, answer, question
from burnish.miniature.annotated import PicturesPlan, annotated_pictures
from burnish.miniature.eyes import CLASSES, EyesPlan, learn_to_recognise, to_recognise
from burnish.miniature.judges import new_judge
from burnish.miniature.pictures import draw_edit, draw_scene
from burnish.miniature.sight import (
    ASKED,
    DESCRIBE,
    KINDS,
    Reader,
    SightPlan,
    checked_picture,
    checked_portrait,
    describe,
    drawn,
    learn_to_see,
    sample_texts,
    told,
)
from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.parts.qwen_tokens import byte_tokenizer, learned_tokenizer
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.reward_training import RUBRICS, RewardTrainingConfig, SourceConfig, train_judge
from burnish.rewards.vlm import Judge, Vlm
from burnish.tracking import RunError, read_rows
from burnish.types import Scored, ScoreRequest
from burnish.world.flaws import otherwise, spoil
from burnish.world.raters import Raters, rate_edit
from burnish.world.render import render
from burnish.world.scenes import Scene, is_held_out, sample_scene

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
DIMENSIONS = ("aesthetic", "instruction")
FEW = PicturesPlan(
    rendered_scenes=3,
    rendered_edits=2,
    portraits=1,
    mismatched_scenes=1,
    mismatched_edits=1,
    sampled_scenes=2,
    sampled_edits=1,
    members=2,
)


def picture(level: int, side: int = 32) -> bytes:
    """A grey picture whose brightness is its quality."""
    return images.encode_png(Image.new("RGB", (side, side), (level,) * 3))


def annotation(number: int, dimension: str = "aesthetic") -> Annotation:
    """One picture of the prompt `number // 3`; three pictures share a prompt."""
    score = 1 + 2 * (number % 3)
    is_edit = dimension == "instruction"
    return Annotation(
        id=f"{dimension}-{number}",
        task="edit" if is_edit else "t2i",
        prompt=f"prompt {number // 3}",
        sources=(picture(9),) if is_edit else (),
        output=picture(40 * score),
        dimension=dimension,
        score_mean=float(score),
        score_std=0.5,
        num_raters=5,
        reasoning=f"bright {score}." if number % 2 else "dark!",
        pair_group=f"{dimension} {number // 3}",
        licence="Apache-2.0",
        origin="test",
    )


SOME = [annotation(number, dimension) for number in range(18) for dimension in DIMENSIONS]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model, its rubrics, and annotations."""
    folder = tmp_path_factory.mktemp("fresh")
    with runtime.seeded(0, "fresh"):
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        pipeline = assemble(byte_tokenizer(), encoder=small)
    pipeline.text_encoder.save_pretrained(folder / "model")
    pipeline.processor.save_pretrained(folder / "model")
    (folder / "rubrics").mkdir()
    for name in DIMENSIONS:
        (folder / "rubrics" / f"{name}.md").write_text(f"Rate {name}.\n")
    write_annotations(folder / "some.jsonl", SOME)
    return folder


def config(fresh: Path, **changes: Any) -> RewardTrainingConfig:
    """Six quick steps."""
    settings: dict[str, Any] = {
        "path": str(fresh / "model"),
        "annotations": (SourceConfig(path=str(fresh / "some.jsonl")),),
        "rubrics": str(fresh / "rubrics"),
        "lora_rank": 0,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "steps": 6,
        "batch_size": 4,
        "held_out": 0.3,
        "reasoning": False,
        "save_every": 2,
    }
    return RewardTrainingConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def trained(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training that was not cut off."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_judge(config(fresh), out, CPU)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "judge" / "model.safetensors")


def test_training_can_be_the_first_thing_a_process_imports() -> None:
    """Where torch and torchvision are unequal builds, what comes first decides."""
    subprocess.run([sys.executable, "-c", "import burnish.reward_training"], check=True)


def test_the_command_trains_and_tells_what_it_measured(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(
        f"annotations: [{{path: {fresh / 'some.jsonl'}}}]\nrubrics: {fresh / 'rubrics'}\n"
        "lora_rank: 0\nsteps: 1\nbatch_size: 4\nheld_out: 0.3\nreasoning: false\n"
    )
    settings = [f"path={fresh / 'model'}", "steps=2", "runtime.device=cpu"]
    options = ["--config", tmp_path / "settings.yaml", "--out", tmp_path / "run", "--json"]
    assert main(["reward", "train", *map(str, [*settings, *options])]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert set(found["held_out"]) == set(DIMENSIONS)
    assert any(line.startswith("instruction: count ") for line in lines)
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1
    assert Judge.load(Path(found["judge"])).rubrics.keys() == set(DIMENSIONS)


class TestLessons:
    @pytest.mark.parametrize("is_skipped", [False, True])
    def test_the_tokens_up_to_the_digit_are_those_that_the_reward_reads(
        self, fresh: Path, trained: Path, is_skipped: bool
    ) -> None:
        judge = Judge.load(trained / "judge")
        collate = Collator.of(judge.processor)
        edit = next(one for one in SOME if one.task == "edit" and one.reasoning)
        several = replace(edit, sources=(*edit.sources, picture(200), picture(90)))
        for taught in (SOME[1], SOME[2], several):
            rubric = judge.rubrics[taught.dimension]
            said = "" if is_skipped else spoken(taught)
            lesson = Lesson(taught, rubric, said, not is_skipped)
            # Beside a longer one, so that there is padding.
            batch = collate(
                [(lesson,), (Lesson(SOME[0], judge.rubrics["aesthetic"], "m" * 40, True),)]
            )
            vlm = Vlm(judge, taught.dimension, reasoning=False)
            drawn = images.to_tensor(images.decode(taught.output, where="test"))
            asked = vlm._ask([ScoreRequest(prompt=prompt_of(taught), image=drawn)])
            ids = judge.processor.tokenizer(said)["input_ids"] if said else []
            expected = [*asked.inputs["input_ids"][0].tolist(), *ids, *vlm._alphabet.marker]
            place, there = int(batch["places"][0]), batch["attention_mask"][0].bool()
            assert batch["input_ids"][0, :place][there[:place]].tolist() == expected
            digit = int(batch["input_ids"][0, place])
            assert digit == vlm._alphabet.digits[int(taught.score_mean or 0) - 1]
            assert vlm._alphabet.place_of_digit(batch["input_ids"][0].tolist()) == place
            patches = len(asked.inputs["pixel_values"])
            assert torch.equal(batch["pixel_values"][:patches], asked.inputs["pixel_values"])
            # The digit is never taught as a token, and what is skipped is not taught at all.
            assert not batch["written"][0, place]
            assert int(batch["written"][0].sum()) == (0 if is_skipped else len(ids) + 8 + 1)

    def test_text_and_ids_of_an_answer_agree(self, fresh: Path) -> None:
        tokenizer = byte_tokenizer()
        lesson = Lesson(SOME[1], Rubric("aesthetic", "x"), spoken(SOME[1]), True)
        assert lesson.reasoning == "dark" and spoken(replace(SOME[0], reasoning=" ?!_ ")) == ""

        class Processor:
            pass

        processor: Any = Processor()
        processor.tokenizer = tokenizer
        ids = Collator.of(processor).answer(lesson)
        score = round(SOME[1].score_mean or 0)
        assert tokenizer.decode(ids) == answer("dark", score) + "<|im_end|>"

    def test_reasoning_may_not_hold_the_marker(self) -> None:
        with pytest.raises(ConfigError, match=r"annotation aesthetic-0: need reasoning without"):
            spoken(replace(SOME[0], reasoning=f"so{MARKER}5 it is"))

    def test_every_exercise_is_seen_once_an_epoch_and_draws_depend_on_the_place_alone(self) -> None:
        rubrics = [Rubric(name, name) for name in DIMENSIONS]
        chosen = exercises(SOME, in_pairs=False)
        made = [
            Curriculum(chosen, rubrics, length=3 * len(chosen), skip_reasoning=0.5, seed=1)
            for _ in range(2)
        ]
        lessons = [made[0][place] for place in range(len(made[0]))]
        assert lessons[::-1] == [made[1][place] for place in reversed(range(len(made[1])))]
        for epoch in range(3):
            part = lessons[epoch * len(chosen) : (epoch + 1) * len(chosen)]
            assert sorted(item[0].annotation.id for item in part) == sorted(a.id for a in SOME)
        skipped = [not item[0].reasoning for item in lessons]
        assert 0.3 < np.mean(skipped) < 0.7
        assert [item[0].is_written for item in lessons] == [not skip for skip in skipped]

    def test_where_nobody_reasons_the_judge_learns_to_answer_at_once(self) -> None:
        silent = [replace(a, reasoning="") for a in SOME]
        for given, is_written in ((silent, True), ([*silent[1:], SOME[0]], False)):
            chosen = exercises(given, in_pairs=False)
            rubrics = [Rubric(name, name) for name in DIMENSIONS]
            made = Curriculum(chosen, rubrics, length=len(chosen), skip_reasoning=0.0, seed=0)
            assert all(
                lesson.is_written == (is_written or bool(lesson.reasoning))
                for (lesson,) in (made[place] for place in range(len(made)))
            )

    def test_pictures_of_one_prompt_are_compared_with_and_without_a_group(self) -> None:
        loose = [replace(a, pair_group=None) for a in SOME]
        for found in (compared(SOME), compared(loose)):
            assert len(found) == len(SOME)
            assert all((b.score_mean or 0) > (w.score_mean or 0) for b, w in found)
            assert all(b.dimension == w.dimension and b.prompt == w.prompt for b, w in found)

    def test_files_whose_groups_have_one_name_are_compared_apart(self, tmp_path: Path) -> None:
        def compare(name: str, prompt: str, **said: Any) -> SourceConfig:
            some = [
                replace(SOME[2 * n], id=str(n), prompt=prompt, output=picture(40 * n), **part)
                for n, part in enumerate({k: v[n] for k, v in said.items()} for n in range(2))
            ]
            write_annotations(tmp_path / name, some)
            return SourceConfig(path=str(tmp_path / name))

        ranks = {"score_mean": (None, None), "pair_group": ("1", "1"), "rank": (1, 2)}
        files = [compare("a.jsonl", "a", **ranks), compare("b.jsonl", "b", **ranks)]
        ids = [(better.id, worse.id) for better, worse in compared(read_sources(files, ()))]
        assert ids == [("0-0", "0-1"), ("1-0", "1-1")]
        # One prompt, and still nobody has compared pictures of two rankings.
        files = [files[0], compare("c.jsonl", "a", **ranks)]
        assert len(compared(read_sources(files, ()))) == 2
        # Scores are on one scale.
        scores = {"score_mean": (1.0, 2.0), "pair_group": (None, None)}
        files = [compare(name, "a", **scores) for name in ("d.jsonl", "e.jsonl")]
        assert len(compared(read_sources(files, ()))) == 4

    def test_annotations_that_only_compare_are_told_of_where_scores_are_learnt(
        self, tmp_path: Path
    ) -> None:
        ranked = [replace(a, score_mean=None, rank=n % 3 + 1) for n, a in enumerate(SOME[::2])]
        mixed = [*ranked, *SOME[1::2]]
        write_annotations(tmp_path / "mixed.jsonl", mixed)
        write_annotations(tmp_path / "scored.jsonl", SOME)
        files = [SourceConfig(path=str(tmp_path / f"{n}.jsonl")) for n in ("mixed", "scored")]
        with pytest.warns(
            AnnotationsWarning, match=r"mixed.jsonl: 18 of 36 .*loss=pairwise"
        ) as told:
            assert len(exercises(read_sources(files, (), scored=True), in_pairs=False)) == 54
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_sources(files, ())
            read_sources(files, ("instruction",), scored=True)


class TestTraining:
    def test_the_loss_falls_and_its_parts_are_logged(self, trained: Path) -> None:
        rows = read_rows(trained / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(6))
        assert rows[-1]["loss/total"] < 0.8 * rows[0]["loss/total"]
        for row in rows:
            parts = row["loss/reasoning"] + row["loss/score"] + row["loss/mass"]
            assert row["loss/total"] == pytest.approx(parts, rel=1e-4)

    def test_two_processes_share_the_steps_and_one_of_them_writes(
        self, fresh: Path, tmp_path: Path
    ) -> None:
        settings = [
            f"path={fresh / 'model'}",
            f"annotations=[{{path: {fresh / 'some.jsonl'}}}]",
            f"rubrics={fresh / 'rubrics'}",
            "loss=pairwise lora_rank=0 steps=2 batch_size=2 held_out=0.3 reasoning=false",
            "save_every=1 runtime.device=cpu runtime.threads=1",
        ]
        words = " ".join(settings[3:]).split()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "burnish", "reward", "train"]
        subprocess.run(
            [*command, *settings[:3], *words, "--out", str(tmp_path / "run")], check=True
        )
        assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
        newest = tmp_path / "run" / "checkpoints" / "checkpoint-2"
        assert {"model.safetensors", "pair_scale.safetensors", "rng_state_1.pth"} <= {
            path.name for path in newest.iterdir()
        }
        assert Judge.load(tmp_path / "run" / "judge").rubrics.keys() == set(DIMENSIONS)

    def test_a_share_of_the_start_is_written_weight_by_weight(
        self, fresh: Path, trained: Path, tmp_path: Path
    ) -> None:
        train_judge(config(fresh, start_share=0.25), tmp_path / "run", CPU)
        start = load_file(fresh / "model" / "model.safetensors")
        mixed, end = weights(tmp_path / "run"), weights(trained)
        assert not torch.equal(mixed["lm_head.weight"], end["lm_head.weight"])
        for name, found in mixed.items():
            torch.testing.assert_close(found, 0.75 * end[name] + 0.25 * start[name])

    def test_the_judge_loads_and_scores(self, trained: Path) -> None:
        judge = Judge.load(trained / "judge")
        assert set(judge.rubrics) == set(DIMENSIONS) and judge.longest_answer >= 10
        assert judge.model.generation_config.use_cache is not False
        end = judge.processor.tokenizer.get_vocab()["<|im_end|>"]
        assert end in np.atleast_1d(judge.model.generation_config.eos_token_id)
        facts = json.loads((trained / "judge" / "judge.json").read_text())
        assert set(facts["held_out"]) == set(DIMENSIONS)
        drawn = images.to_tensor(images.decode(SOME[0].output, where="test"))
        request = ScoreRequest(prompt=prompt_of(SOME[0]), image=drawn)
        for reasoning in (True, False):
            (score,) = Vlm(judge, "aesthetic", reasoning=reasoning).score([request])
            assert isinstance(score, Scored) or score.reason

    def test_a_training_that_was_cut_off_goes_on_bit_for_bit(
        self, fresh: Path, trained: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"

        def stop(step: int) -> None:
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_judge(config(fresh), out, CPU, on_step=stop)
        steps: list[int] = []
        train_judge(config(fresh), out, CPU, on_step=steps.append)
        assert steps == [5, 6]
        cut, whole = weights(out), weights(trained)
        assert all(torch.equal(cut[name], whole[name]) for name in whole)
        assert (out / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
        judged = [(path / "judge" / "judge.json").read_bytes() for path in (out, trained)]
        assert judged[0] == judged[1]
        # A judge that is done is not trained again.
        train_judge(config(fresh), out, CPU, on_step=stop)

    @pytest.mark.parametrize("loss", ["expected", "ordinal", "pairwise"])
    def test_each_loss_runs(self, fresh: Path, tmp_path: Path, loss: str) -> None:
        chosen = config(fresh, loss=loss, steps=2, skip_reasoning=0.0)
        folder = train_judge(chosen, tmp_path / "run", CPU)
        rows = read_rows(tmp_path / "run" / "metrics.jsonl")
        assert len(rows) == 2 and all(np.isfinite(row["loss/total"]) for row in rows)
        facts = json.loads((folder / "judge.json").read_text())
        if loss == "pairwise":
            assert facts["pair_scale"] != 1 and 0.9 < facts["pair_scale"] < 1.1
            assert "pair_scale" not in weights(tmp_path / "run")
        assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
        Judge.load(folder)

    def test_lora_trains_adapters_alone_and_is_merged(self, fresh: Path, tmp_path: Path) -> None:
        chosen = config(fresh, lora_rank=2, loss="pairwise", steps=3, save_every=1)

        def stop(step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

        for name, on_step in (("whole", print), ("cut", stop)):
            try:
                train_judge(chosen, tmp_path / name, CPU, on_step=on_step)
            except KeyboardInterrupt:
                train_judge(chosen, tmp_path / name, CPU)
        saved = load_file(
            next((tmp_path / "whole").glob("checkpoints/*-3/adapter_model.safetensors"))
        )
        assert saved and all("lora_" in name for name in saved)
        before, after = (
            load_file(fresh / "model" / "model.safetensors"),
            weights(tmp_path / "whole"),
        )
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(
            "language_model.layers" in name and name.endswith("_proj.weight") for name in changed
        )
        cut = weights(tmp_path / "cut")
        assert all(torch.equal(cut[name], after[name]) for name in after)

    def test_the_limit_on_pixels_holds_in_training_and_in_use(
        self, fresh: Path, tmp_path: Path
    ) -> None:
        chosen = config(fresh, steps=1, max_pixels=1024)
        judge = Judge.load(train_judge(chosen, tmp_path / "run", CPU))
        large = Image.new("RGB", (96, 96))
        inputs = judge.processor(text=["<|image_pad|>"], images=[[large]], return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]

    def test_a_lost_training_stops_by_name(self, fresh: Path, tmp_path: Path) -> None:
        chosen = config(fresh, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0)
        with pytest.raises(RunError, match="need a finite loss") as caught:
            train_judge(chosen, tmp_path / "run", CPU)
        assert "\n" not in str(caught.value)


def losing(**changes: Any) -> Callable[[Path, Path], RewardTrainingConfig]:
    """A configuration with a fault, as a function of the fixture and of an empty folder."""
    return lambda fresh, empty: config(fresh, **changes)


def without_digits(fresh: Path, empty: Path) -> RewardTrainingConfig:
    alphabet = sorted(set(ByteLevel.alphabet()) - {"3"})
    tokenizer = learned_tokenizer({symbol: n for n, symbol in enumerate(alphabet)}, [])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    pipeline = assemble(tokenizer, encoder=small)
    pipeline.text_encoder.save_pretrained(empty / "model")
    pipeline.processor.save_pretrained(empty / "model")
    return config(fresh, path=str(empty / "model"))


def ranks_alone(fresh: Path, empty: Path) -> RewardTrainingConfig:
    ranked = [replace(a, score_mean=None, rank=1) for a in SOME]
    write_annotations(empty / "ranks.jsonl", ranked)
    return config(fresh, annotations=(SourceConfig(path=str(empty / "ranks.jsonl")),))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (losing(dimensions=("aestetic",)), "did you mean 'aesthetic'"),
        (losing(annotations=()), "need at least one file, got none"),
        (losing(annotations=(SourceConfig(path="none.jsonl"),)), "none.jsonl"),
        (losing(annotations=(SourceConfig(path="x", reader="hpdv4"),)), "did you mean 'hpdv3'"),
        (
            losing(rubrics="nowhere"),
            "need a rubric for each dimension of the annotations, got none",
        ),
        (losing(held_out=0.9999), "got all of them held out"),
        (losing(path="nowhere"), "need the folder of a Qwen-VL model"),
        (losing(path=str(RUBRICS)), "need the folder of a Qwen-VL model"),
        (without_digits, "one token for the digit 3"),
        (ranks_alone, "need annotations with a score"),
    ],
)
def test_a_faulty_configuration_is_one_line(
    fresh: Path,
    tmp_path: Path,
    faulty: Callable[[Path, Path], RewardTrainingConfig],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train_judge(faulty(fresh, tmp_path), tmp_path / "run", CPU)
    assert "\n" not in str(caught.value)
    # A typing error does not make the folder its own: the same command, corrected, may use it.
    assert not (tmp_path / "run").exists()


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As the templates of Qwen's thinking models: a new answer begins in a thought, a begun one behind
an empty thought."""


def test_a_server_continues_an_answer_where_the_lessons_of_a_thinking_model_end(
    fresh: Path, tmp_path: Path
) -> None:
    # After `vision_build`, as in the package.
    from transformers import AutoProcessor

    shutil.copytree(fresh / "model", tmp_path / "thinking")
    (tmp_path / "thinking" / "chat_template.jinja").write_text(THINKING)
    lesson = Lesson(SOME[0], Rubric(SOME[0].dimension, "Rate it."), "It is good", True)
    user = {"role": "user", "content": question(lesson.rubric, "a cat", num_sources=0)}
    shown: dict[str, str] = {}
    for name, model in (("plain", fresh / "model"), ("thinking", tmp_path / "thinking")):
        judge = read_trainable(model, lora_rank=0, max_pixels=None, device=CPU.device)
        judge.collator.processor.save_pretrained(tmp_path / name / "written")
        processor = AutoProcessor.from_pretrained(tmp_path / name / "written")
        ids = judge.collator([(lesson,)])["input_ids"][0]
        taught = processor.tokenizer.decode(ids).partition("<|im_start|>assistant")[2]
        for template in (processor.chat_template, processor.tokenizer.chat_template):
            shown[name] = processor.apply_chat_template(
                [user, {"role": "assistant", "content": f"{lesson.reasoning}{MARKER}"}],
                chat_template=template,
                continue_final_message=True,
                tokenize=False,
            )
            assert taught.startswith(shown[name].partition("<|im_start|>assistant")[2])
    assert shown["plain"] == shown["thinking"]


def test_a_judge_that_is_trained_again_keeps_its_rubrics_and_its_split(
    fresh: Path, trained: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(trained / "judge", judge)
    (judge / "rubrics" / "aesthetic.md").write_text("Rate it as before.")
    again = train_judge(
        config(fresh, path=str(judge), rubrics=None, steps=1), tmp_path / "run", CPU
    )
    assert Judge.load(again).rubrics["aesthetic"].text == "Rate it as before."
    with pytest.raises(ConfigError, match=r"held_out=0\.3 seed=0, got held_out=0\.3 seed=1"):
        train_judge(config(fresh, path=str(judge), seed=1), tmp_path / "other", CPU)


def test_a_training_does_not_go_on_with_other_annotations(
    fresh: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(fresh, tmp_path / "moved")
    mine = config(tmp_path / "moved", steps=1)
    train_judge(mine, tmp_path / "run", CPU)
    train_judge(mine, tmp_path / "run", CPU)
    changed = [replace(a, score_mean=2.0) for a in SOME]
    write_annotations(tmp_path / "moved" / "some.jsonl", changed)
    with pytest.raises(RunError, match="need annotations as they were when"):
        train_judge(mine, tmp_path / "run", CPU)


def test_ties_cannot_be_compared() -> None:
    ties = [replace(a, score_mean=3.0) for a in SOME]
    with pytest.raises(ConfigError, match="need annotations that compare"):
        exercises(ties, in_pairs=True)


# The loss


def test_reasoning_and_score_are_means_of_their_own() -> None:
    draws = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 6, 9, generator=draws).log_softmax(dim=-1)
    ids = torch.randint(9, (2, 6), generator=draws)
    targets = {
        "places": torch.tensor([4, 4]),
        "written": torch.tensor([[1, 1, 1, 1, 0, 1], [0] * 6]).bool(),
        "scores": torch.tensor([4.0, 2.0]),
        "soft_labels": torch.eye(5)[[3, 1]],
    }
    asked = Objective(
        loss="soft_label",
        reasoning_weight=2.0,
        score_weight=3.0,
        mass_weight=1.0,
        digits=(2, 3, 4, 5, 6),
        learning_rate=1.0,
    )
    total, metrics = judge_loss(log_probs, ids, targets, asked)
    tokens = [0, 1, 2, 3, 5]
    reasoning = -log_probs[0, tokens, ids[0, tokens]].mean()
    # With unit weights the digit's loss and the mass penalty are its plain cross-entropy.
    digit = -(log_probs[0, 4, 5] + log_probs[1, 4, 3]) / 2
    assert metrics["loss/reasoning"] == pytest.approx(float(reasoning))
    assert metrics["loss/score"] + metrics["loss/mass"] == pytest.approx(float(digit))
    expected = 2 * reasoning + 3 * metrics["loss/score"] + metrics["loss/mass"]
    torch.testing.assert_close(total, expected)


# Agreement


def rated(scores: np.ndarray) -> list[Annotation]:
    return [
        replace(SOME[0], id=str(n), prompt=str(n // 4), pair_group=None, score_mean=float(score))
        for n, score in enumerate(scores)
    ]


def test_a_calibration_rises_and_misses_less_than_the_raw_score() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, 400)
    raw = 2 + 0.4 * truth + rng.normal(0, 0.1, 400)
    fitted = fit_calibration(rated(truth), raw.tolist())
    assert fitted is not None and len(fitted.raw) <= KNOTS + 2
    assert bool((np.diff(fitted.raw) > 0).all() and (np.diff(fitted.calibrated) > 0).all())
    assert (fitted(1.0), fitted(5.0)) == (1.0, 5.0)
    after = np.mean([abs(fitted(x) - y) for x, y in zip(raw, truth, strict=True)])
    assert after < 0.5 * np.abs(raw - truth).mean()


def test_a_calibration_is_nowhere_flat_though_raters_agree_on_the_best_and_the_worst() -> None:
    """What is better than all that was seen is better still, and pictures seen stay apart."""
    rng = np.random.default_rng(0)
    raw = np.sort(rng.uniform(1.5, 4.9, 400))
    truth = np.clip(np.round((raw - 2) * 2), 1, 5)
    assert (truth == 5).mean() > 0.1 and (truth == 1).mean() > 0.1
    fitted = fit_calibration(rated(truth), raw.tolist())
    assert fitted is not None and (fitted(1.0), fitted(5.0)) == (1.0, 5.0)
    found = [fitted(score) for score in (1.0, *raw, 5.0)]
    assert bool((np.diff(found) > 0).all())
    assert fitted(raw[-1]) > 4.9 and fitted(raw[0]) < 1.1
    # Raters who never differ, too.
    same = fit_calibration(rated(np.full(40, 5.0)), np.linspace(2, 4, 40).tolist())
    assert same is not None and same(2.0) < same(4.0) < same(5.0) == 5


def test_held_out_pictures_are_decoded_a_batch_at_a_time(
    small_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand of them at once would fill the memory of a machine."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def decoded(one: Annotation) -> ScoreRequest:
        nonlocal most
        request = request_of(one)
        alive.add(request.image)
        most = max(most, len(alive))
        return request

    monkeypatch.setattr("burnish.judges.agreement.request_of", decoded)
    some = [replace(annotation(n), dimension="alignment") for n in range(12)]
    judge = Judge.load(small_judge)
    found = measured(judge, some, limit=12, reasoning=False, batch_size=2)["held_out"]
    assert found["alignment"]["failed"] == 0 and 2 <= most <= 4


def test_few_or_failed_scores_give_no_calibration_and_failures_are_counted() -> None:
    known = rated(np.linspace(1, 5, 2 * FEWEST))
    raw: list[float | None] = [float(n) for n in range(FEWEST - 1)]
    raw += [None] * (len(known) - len(raw))
    assert fit_calibration(known, raw) is None
    found = agreement(known, raw)
    assert found["count"] == 2 * FEWEST and found["failed"] == (FEWEST + 1) / (2 * FEWEST)


def test_agreement_is_whole_for_the_truth_and_half_for_a_constant() -> None:
    truth = np.random.default_rng(0).uniform(1, 5, 40)
    right = agreement(rated(truth), truth.tolist())
    assert right["spearman"] == pytest.approx(1) and right["pair_accuracy"] == 1
    assert right["absolute_error"] == 0 and right["pairs"] == 10 * 6
    constant = agreement(rated(truth), [3.0] * 40)
    assert constant["spearman"] is None and constant["pair_accuracy"] == 0.5


def test_agreement_counts_prompts_and_compares_only_what_was_compared() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, 80)
    raw: list[float | None] = [*np.clip(truth + rng.normal(0, 0.5, 80), 1, 5)]
    loose = rated(truth)
    apart = [replace(a, pair_group=str(n // 2)) for n, a in enumerate(loose)]
    assert calibrated_apart(apart, raw) == calibrated_apart(loose, raw) is not None
    ours, theirs = agreement(apart, raw), agreement(loose, raw)
    assert ours["within_prompt"] == theirs["within_prompt"] is not None
    assert (ours["pairs"], theirs["pairs"]) == (40, 20 * 6)


# The rubrics and the miniature's judge


def test_the_shipped_rubrics_can_be_read_and_fill_one_page_at_most() -> None:
    for folder, most in ((RUBRICS, 45), (located("embedded:rubrics"), 1)):
        found = [Rubric.read(path) for path in sorted(folder.glob("*.md"))]
        names = {rubric.dimension for rubric in found}
        assert names >= {"alignment", "aesthetic", "portrait", "instruction"}
        assert all(len(rubric.text.splitlines()) <= most for rubric in found)
    assert (RUBRICS / "consistency.md").is_file()


TEXTS = list(sample_texts(50))


def test_the_miniatures_judge_is_tiny_and_sees_sixteen_tokens_of_a_picture() -> None:
    model, processor = new_judge(TEXTS)
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6
    content = [{"type": "image"}, {"type": "text", "text": "Rate alignment."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[[Image.new("RGB", (64, 64))]], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    again, _ = new_judge(TEXTS)
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_annotated_pictures_are_a_function_of_the_plan() -> None:
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    found = annotated_pictures(base, FEW)
    assert found == annotated_pictures(base, FEW)
    assert {a.dimension for a in found} >= {"alignment", "aesthetic", "instruction"}
    assert len({a.output for a in found}) >= 14
    assert len({a.pair_group for a in found}) == 11


def test_held_out_pictures_ask_for_what_nobody_was_trained_on() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, held_out=held) for held in (True, False) for _ in range(20)]
    assert [is_held_out(scene) for scene in scenes] == [True] * 20 + [False] * 20
    edits = [draw_edit(rng, held_out=True) for _ in range(10)]
    assert all(is_held_out(edit.source) or is_held_out(edit.target) for edit in edits)


def test_a_tower_learns_to_recognise_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    plan = EyesPlan(steps=8, batch_size=16, save_every=5)

    def learn(stop: int = 0) -> tuple[list[dict[str, float]], torch.Tensor]:
        model, processor = new_judge(TEXTS)
        done: list[dict[str, float]] = []

        def on_step(found: dict[str, float]) -> None:
            done.append(found)
            if len(done) == stop:
                raise KeyboardInterrupt

        folder = tmp_path / ("cut" if stop or (tmp_path / "cut").is_dir() else "whole")
        visual = model.model.visual
        with contextlib.suppress(KeyboardInterrupt):
            learn_to_recognise(visual, processor, base, plan, CPU, folder=folder, on_step=on_step)
        return done, torch.cat([p.flatten() for p in visual.parameters()])

    whole, weights = learn()
    assert np.mean([f["loss"] for f in whole[-3:]]) < np.mean([f["loss"] for f in whole[:3]])
    learn(stop=7)
    rest, again = learn()
    assert rest == whole[5:] and torch.equal(weights, again)


def test_what_a_picture_does_not_show_is_left_out() -> None:
    for seed in range(30):
        pixels, wanted = to_recognise(np.random.default_rng(seed))
        found = dict(zip(CLASSES, wanted, strict=True))
        assert pixels.shape == (64, 64, 3) and found["flaw"] >= 0
        if found["0.shape"] == CLASSES["0.shape"].index("none"):
            assert found["0.colour"] < 0
        # A picture has one category, so most keys are not there.
        assert sum(place >= 0 for place in wanted) < 16


def test_what_is_said_of_pictures_names_what_is_there() -> None:
    scene = sample_scene(np.random.default_rng(0), category="typography", style="flat")
    assert f"word {scene.values['word']}" in describe(scene, is_clean=True)


def test_of_an_edit_the_change_and_all_the_rest_are_checked() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        edit = draw_edit(rng)
        shown = otherwise(edit.target, rng, share=0.5)
        said = rate_edit(render(shown), edit, Raters.hire(), rng)[0].reasoning
        core, rest = said.split("; ")
        assert len(core.split(", ")) == len(edit.changes)
        assert len(rest.split(", ")) >= 2


def test_checks_name_what_was_asked_and_what_is_there() -> None:
    said = [checked_picture(np.random.default_rng(seed)) for seed in range(40)]
    checks = [check for sight in said for check in sight.text.split(", ")]
    for check in checks:
        asked, _, rest = check.partition(" seen ")
        seen, verdict = rest.rsplit(" ", 1)
        assert (verdict == "right") == (asked.endswith(f" {seen}"))
    share = sum(check.endswith("wrong") for check in checks) / len(checks)
    assert 0.35 < share < 0.5


def test_what_raters_do_not_check_is_not_checked() -> None:
    """Of objects beside each other nobody counts one, and of a hand that is down no fingers."""
    pairs = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        asked = {part.split(" seen ")[0] for part in checked_portrait(rng).text.split(", ")}
        assert "fingers 0" not in asked
        said = checked_picture(rng).text
        pairs += "place left" in said
        assert "place left" not in said or "count" not in said
    assert pairs > 2


def test_a_reader_teaches_what_is_said_and_nothing_else() -> None:
    """Up to where the score will stand; of a description, to the end of the turn."""
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    _, processor = new_judge(TEXTS)
    rng = np.random.default_rng(0)
    for make in KINDS.values():
        sights = drawn(base, make, 5, rng)
        count = len(sights[0].pictures)
        inputs, written = Reader(processor)(sights)
        assert len(inputs["image_grid_thw"]) == 5 * count
        for sight, ids, taught in zip(sights, inputs["input_ids"], written, strict=True):
            end = "<|im_end|>" if sight.rubric is DESCRIBE else MARKER
            assert processor.tokenizer.decode(ids[taught]) == f"{sight.text}{end}"
            assert taught[-1] and not taught[: int(taught.int().argmax())].any()


def test_what_raters_wrote_is_read_as_the_judge_will_be_asked() -> None:
    """Token for token what the judge's own training puts before the digit."""
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    _, processor = new_judge(TEXTS)
    annotations = annotated_pictures(base, FEW)
    collator = Collator.of(processor)
    for annotation in annotations[:: len(annotations) // 12]:
        rubric = ASKED[annotation.dimension]
        lesson = Lesson(annotation, rubric, spoken(annotation), is_written=True)
        taught = collator([(lesson,)])
        inputs, _ = Reader(processor)([told(annotation)])
        assert torch.equal(inputs["input_ids"], taught["input_ids"][:, :-2])
        assert torch.equal(inputs["pixel_values"], taught["pixel_values"])


def test_a_model_learns_to_see_and_a_training_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    annotations = annotated_pictures(base, FEW)
    plan = SightPlan(steps=4, batch_size=4, save_every=2)

    def learn(folder: Path, stop: int = 4) -> tuple[list[dict[str, float]], Any]:
        model, processor = new_judge(TEXTS)
        done = []

        def on_step(found: dict[str, float]) -> None:
            done.append(found)
            if len(done) == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            learn_to_see(
                model, processor, base, annotations, plan, CPU, folder=folder, on_step=on_step
            )
        return done, model

    whole, model = learn(tmp_path / "whole", stop=0)
    assert all(value < 8 for found in whole for value in found.values())
    learn(tmp_path / "cut", stop=3)
    rest, again = learn(tmp_path / "cut", stop=0)
    assert rest == whole[2:]
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_a_flawed_version_may_leave_nothing_to_spoil_further() -> None:
    from burnish.miniature.annotated import _versions

    values = {
        "style": "flat",
        "background": "white",
        "0.shape": "star",
        "0.colour": "red",
        "0.size": "large",
        "0.place": "centre",
        "0.count": 1,
    }
    rng = np.random.default_rng(0)
    scene = Scene("general", values)
    assert len(list(_versions(scene, 200, rng, spoil))) == 200
