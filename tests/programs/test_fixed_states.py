"""The gap to the teachers on states that stay, and the student that it chooses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.looking import look

from burnish import checkpoint, runtime
from burnish.algorithms.base import StageContext
from burnish.algorithms.distill import Distill, DistillConfig, TeacherConfig
from burnish.config import ConfigError, located
from burnish.fixed_states import FixedStates, FixedStatesConfig, FixedStatesWarning
from burnish.looks import Watch
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.types import Guidance, Prompt

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
PICTURES = "embedded:prompts/pictures.jsonl"


@pytest.fixture(scope="module")
def policy() -> QwenImage21Policy:
    return QwenImage21Policy.tiny()


def shaken(policy: QwenImage21Policy, seed: int, size: float = 0.05) -> QwenImage21Policy:
    other = policy.sibling()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            draws = torch.Generator().manual_seed(seed)
            parameter += size * torch.randn(parameter.shape, generator=draws)
    return other


@pytest.fixture(scope="module")
def teacher(policy: QwenImage21Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    shaken(policy, 0).save(folder)
    return folder


def prompts() -> list[Prompt]:
    return read_prompts(located("embedded:prompts/train.jsonl"))[:6]


def watch(
    policy: QwenImage21Policy, teacher: Path, folder: Path, *, step: int = 0, **changes: Any
) -> Watch:
    plan = FixedStatesConfig(**{"every": 4, "num_prompts": 2, "pictures": PICTURES} | changes)
    config = DistillConfig(
        teachers={"t2i": TeacherConfig(path=str(teacher), guidance_scale=1.0)}, fixed_states=plan
    )
    context = StageContext(
        policy=policy, guidance=Guidance(), num_steps=3, steps=12, kernel="ode",
        noise_level=0.0, num_updates=1, micro_batch=16, seed=0, rewards={},
    )  # fmt: skip
    found = Distill(config, context).watch(folder, step, prompts())
    assert isinstance(found, FixedStates)
    return found


def learner(policy: QwenImage21Policy) -> QwenImage21Policy:
    own = policy.sibling()
    own.transformer.requires_grad_(True)
    return own


def begun(
    policy: QwenImage21Policy, teacher: Path, folder: Path
) -> tuple[QwenImage21Policy, Watch]:
    """A student at the start, looked at once."""
    student, looking = learner(policy), watch(policy, teacher, folder)
    look(looking, student, 0, None, CPU)
    return student, looking


def become(
    student: QwenImage21Policy, start: QwenImage21Policy, teacher: Path, share: float
) -> None:
    """Weights on the straight line from the start to the teacher."""
    theirs = QwenImage21Policy.load(teacher, resolution=64).transformer.state_dict()
    with torch.no_grad():
        for name, parameter in student.trainable():
            own = start.transformer.state_dict()[name]
            parameter.copy_(torch.lerp(own, theirs[name], share))


def test_the_nearest_student_is_written_and_a_resumed_stage_sees_the_same_states(
    policy: QwenImage21Policy, teacher: Path, tmp_path: Path
) -> None:
    student = learner(policy)
    looking = watch(policy, teacher, tmp_path)
    first = look(looking, student, 0, None, CPU)
    assert first["fixed_states/gap"] == pytest.approx(1.0)
    become(student, policy, teacher, 0.8)
    near = look(looking, student, 4, None, CPU)
    assert near["fixed_states/gap"] < 0.5 and near["fixed_states/learnt_t2i"] > 0.5
    best = {name: p.detach().clone() for name, p in student.trainable()}
    become(student, policy, teacher, 0.3)
    # Cut off after the second look: the states come from the disk, not from what is there now.
    seen = []
    for resumed in (looking, watch(policy, teacher, tmp_path, step=5)):
        far = look(resumed, student, 8, None, CPU)
        assert near["fixed_states/gap"] < far["fixed_states/gap"] < 1
        seen.append(far)
    rows = [json.loads(line) for line in (tmp_path / "fixed-states/looks.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert seen[0] == seen[1]
    assert [part["band"] for part in rows[0]["parts"]] == ["all", "high", "middle", "low"]
    resumed.restore(student)
    assert all(torch.equal(best[name], p) for name, p in student.trainable())


def test_the_teacher_itself_has_no_gap(
    policy: QwenImage21Policy, teacher: Path, tmp_path: Path
) -> None:
    student, looking = begun(policy, teacher, tmp_path)
    become(student, policy, teacher, 1.0)
    found = look(looking, student, 4, None, CPU)
    assert found["fixed_states/gap"] == pytest.approx(0, abs=1e-9)
    assert found["fixed_states/learnt_t2i"] == pytest.approx(1, abs=1e-4)


def test_a_student_that_only_went_astray_is_told(
    policy: QwenImage21Policy, teacher: Path, tmp_path: Path
) -> None:
    looking = watch(policy, teacher, tmp_path)
    look(looking, learner(policy), 0, None, CPU)
    astray = shaken(policy, 5, size=0.2)
    astray.transformer.requires_grad_(True)
    assert look(looking, astray, 4, None, CPU)["fixed_states/gap"] > 1
    with pytest.warns(FixedStatesWarning, match="no student came nearer to its teachers"):
        looking.restore(astray)


def test_a_teacher_whom_nobody_asks_is_a_typo() -> None:
    own = TeacherConfig(path="x", guidance_scale=1.0)
    config = DistillConfig(teachers={"t2i": own, "t2i/portrat": own})
    with pytest.raises(ConfigError, match=r"teachers\.t2i/portrat: need a teacher of some prompt"):
        config.check_prompts(prompts())


def edits_only(folder: Path) -> str:
    lines = located(PICTURES).read_text().splitlines(keepends=True)
    path = folder / "edits.jsonl"
    path.write_text("".join(line for line in lines if '"edit"' in line))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": edits_only}, "need prompts of the teacher t2i, got none in"),
        ({"prompts": PICTURES}, "need other ids in pictures than in prompts"),
        ({"pictures": "embedded:prompts/held-out.jsonl"}, "need a target for every prompt"),
        ({"pictures": "nowhere.jsonl"}, "need a file or folder of prompts, got nowhere.jsonl"),
    ],
)
def test_sets_that_do_not_serve_are_refused_before_anything_is_trained(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {k: v(tmp_path) if callable(v) else v for k, v in changes.items()}
    plan = FixedStatesConfig(**{"pictures": PICTURES} | given)
    config = DistillConfig(
        teachers={"t2i": TeacherConfig(path="x", guidance_scale=1.0)}, fixed_states=plan
    )
    with pytest.raises(ConfigError, match=f"algorithm.fixed_states: {words}"):
        config.check_prompts(prompts())


def test_weights_of_looks_that_are_forgotten_are_never_given_back(
    policy: QwenImage21Policy, teacher: Path, tmp_path: Path
) -> None:
    """Cut off after the best look, and worse the second time: the best is then the one before."""
    student, looking = begun(policy, teacher, tmp_path)
    become(student, policy, teacher, 0.5)
    look(looking, student, 4, None, CPU)
    earlier = {name: p.detach().clone() for name, p in student.trainable()}
    # The stage may be resumed from here, so what was best here must stay.
    checkpoint.save(tmp_path / "checkpoints", 5, {}, {})
    become(student, policy, teacher, 0.9)
    look(looking, student, 8, None, CPU)
    assert checkpoint.steps(tmp_path / "fixed-states") == [4, 8]
    resumed = watch(policy, teacher, tmp_path, step=5)
    assert checkpoint.steps(tmp_path / "fixed-states") == [4]
    become(student, policy, teacher, 0.2)
    look(resumed, student, 8, None, CPU)
    assert resumed.looks.best["step"] == 4
    resumed.restore(student)
    assert all(torch.equal(earlier[name], p) for name, p in student.trainable())
