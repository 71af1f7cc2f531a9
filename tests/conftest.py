"""Settings of all tests: one thread, and no test that needs a GPU where there is none."""

import importlib.util
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook
from torch import Tensor


def check_types(package: str) -> None:
    """Check the arguments and the result of every call in a package that is not imported yet.

    Shapes are checked where a module names any: that binds the arguments of each call, which costs
    far more than a plain check. Modules that name types for type checkers alone are left out.
    """
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    texts = {
        ".".join((package, *file.relative_to(root).with_suffix("").parts)): file.read_text()
        for file in root.rglob("*.py")
    }
    unread = tuple(name for name, text in texts.items() if "if TYPE_CHECKING:\n    from" in text)
    beartype_package(
        package, conf=BeartypeConf(claw_is_pep526=False, claw_skip_package_names=unread)
    )
    shaped = [name for name, text in texts.items() if "from jaxtyping import" in text]
    install_import_hook(shaped, "beartype.beartype")


check_types("burnish")

# Two workers share two cores, and one thread gives the same bits every time.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def same_checks() -> None:
    """Of a list one random item is checked: let it be the same in every run."""
    random.seed(0)


@pytest.fixture(scope="session")
def save_judge() -> Callable[..., Path]:
    """Write a pipeline's encoder as a judge's folder, which is returned."""

    def save(folder: Path, pipeline: Any, rubric: str, longest_answer: int) -> Path:
        pipeline.text_encoder.save_pretrained(folder)
        pipeline.processor.save_pretrained(folder)
        (folder / "rubrics").mkdir()
        (folder / "rubrics" / "alignment.md").write_text(rubric)
        (folder / "judge.json").write_text(f'{{"longest_answer": {longest_answer}}}')
        return folder

    return save


@pytest.fixture(scope="session")
def small_judge(tmp_path_factory: pytest.TempPathFactory, save_judge: Callable[..., Path]) -> Path:
    """The folder of a tiny judge that was taught, in seconds, to score how bright a picture is."""
    # The imports take long, and most tests need no judge.
    from burnish import runtime
    from burnish.policies.parts.qwen_assembly import assemble
    from burnish.policies.parts.qwen_tokens import byte_tokenizer

    with runtime.seeded(0, "small judge"):
        pipeline = assemble(byte_tokenizer(), encoder={"hidden_size": 64})
        teach(pipeline.text_encoder, pipeline.processor)
    return save_judge(tmp_path_factory.mktemp("small_judge"), pipeline, "Is it bright?", 16)


@pytest.fixture
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of Qwen-Image-Edit take seconds to read at the size that diffusers' module has as a
    constant, for its pipeline and for ours."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", 96 * 96)


@pytest.fixture
def copy_with(small_judge: Path, tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """A copy of the small judge with more in its judge.json."""

    def make(more: dict[str, object]) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="copied", dir=tmp_path))
        shutil.copytree(small_judge, folder, dirs_exist_ok=True)
        facts = json.loads((folder / "judge.json").read_text())
        (folder / "judge.json").write_text(json.dumps(facts | more))
        return folder

    return make


def teach(model: Any, processor: Any, steps: int = 120) -> None:
    """Train on random pictures of one or two brightnesses, asked about in random words."""
    from burnish import images
    from burnish.judging import SCALE, Alphabet, Rubric, answer, question

    tokenizer, rubric = processor.tokenizer, Rubric("alignment", "Is it bright?")
    digits = torch.tensor(Alphabet.of(tokenizer).digits)
    said = tokenizer(answer("ok.", 1) + "<|im_end|>")["input_ids"]
    place = len(said) - 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        texts, pictures, targets = [], [], []
        is_edit = bool(torch.rand(()) < 0.5)
        for _ in range(4):
            brightness = torch.rand(())
            drawn = images.to_pil((torch.rand(3, 64, 64) * 0.2 + 0.8 * brightness).clamp(0, 1))
            words = "".join(
                chr(97 + int(n)) for n in torch.randint(26, (int(torch.randint(9, ())),))
            )
            turn = [{"role": "user", "content": question(rubric, words, num_sources=int(is_edit))}]
            head = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            # Any digit, so that the answer ends after each.
            number = int(torch.randint(1, 6, ()))
            texts.append(head + answer("ok.", number) + "<|im_end|>")
            pictures.append([drawn] * (1 + is_edit))
            targets.append(torch.softmax(-((torch.tensor(SCALE) - 1 - 4 * brightness) ** 2), 0))
        inputs = processor(
            text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
        )
        logits = model(**inputs, logits_to_keep=len(said) + 1).logits[:, :-1]
        log_probs: Tensor = logits.log_softmax(dim=-1)
        loss = -(torch.stack(targets) * log_probs[:, place][:, digits]).sum(dim=-1).mean()
        for index, token in enumerate(said):
            if index != place:
                loss = loss - log_probs[:, index, token].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
