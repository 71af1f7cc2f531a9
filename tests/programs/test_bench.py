"""Taking a bench, from pictures to a result, with real judges behind real HTTP."""

import base64
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from tests.checkouts import CHECKOUTS, picture

from burnish import images
from burnish.bench.base import Node
from burnish.bench.geneval import Geneval
from burnish.bench_tree import RESAMPLES, Scores, means, tabulate
from burnish.benching import BenchChoice, ChosenBench
from burnish.cli import main
from burnish.cli.recipes import recipe_path
from burnish.config import load, located, parse
from burnish.jobs import run_job
from burnish.run_config import RunConfig
from burnish.run_folder import is_complete
from burnish.runtime import Runtime
from burnish.tracking import Run, RunError


class Server:
    """An OpenAI-compatible server whose replies a test writes; it keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], str | int] = lambda body: "nothing"
        self._lock = threading.Lock()
        app = FastAPI()
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._chat)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", port=_free_port()))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.config.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _models(self) -> dict[str, Any]:
        return {"data": [{"id": "q-judger"}]}

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        with self._lock:
            self.sent.append(body)
            said = self.reply(body)
        if isinstance(said, int):
            return Response(status_code=said)
        choice = {"index": 0, "message": {"role": "assistant", "content": said}}
        return JSONResponse({"model": "q-judger", "choices": [choice | {"finish_reason": "stop"}]})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def checkout(tmp_path: Path, server: Server) -> Path:
    """Settings of Qwen-Image-Bench with a served judge, as a file."""
    settings = CHECKOUTS["qwen_image_bench"](tmp_path / "checkout")
    judge = {"url": server.url, "model": "q-judger", "retries": 0, "timeout": 20.0}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(settings | {"judge": judge}))
    return path


def pictures(folder: Path, settings: Path, side: int = 32) -> Path:
    """A picture for every item of a bench."""
    found = _taken(settings)
    for place, (_, _, name) in enumerate(found.places()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(place, side).save(folder / name)
    return folder


def _taken(settings: Path) -> ChosenBench:
    return ChosenBench.of(parse(BenchChoice, {"bench": yaml.safe_load(settings.read_text())}).bench)


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        """The JSON of its last line."""
        return json.loads(self.out.splitlines()[-1])


Burnish = Callable[..., Done]


@pytest.fixture
def burnish(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Burnish:
    """The program in this process."""

    def run(*words: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["burnish", *map(str, words)])
        capsys.readouterr()
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return Done(code, told.out, told.err)

    return run


def grades(body: dict[str, Any], score: int = 2) -> str:
    """All facets of the pillar that is asked about."""
    text = body["messages"][-1]["content"][-1]["text"]
    facets = [line[2:].partition(":")[0] for line in text.splitlines() if line.startswith("- ")]
    return json.dumps({"any": {facet: {"score": score} for facet in facets}})


# --- Without a judge -------------------------------------------------------------------------


def test_pictures_that_nobody_judges_are_told(tmp_path: Path, burnish: Burnish) -> None:
    settings = tmp_path / "bench.yaml"
    settings.write_text(yaml.safe_dump(CHECKOUTS["geneval"](tmp_path)))
    drawn = pictures(tmp_path / "mine", settings)
    done = burnish("bench", "run", settings, f"mine={drawn}", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.found == {"pictures": {"mine": str(drawn)}}


@pytest.mark.parametrize("which", ["gedit", "{kind: gedit}", "{kind: gedit, checkout: x}"])
def test_a_bench_without_its_files_says_what_to_give(which: str, burnish: Burnish) -> None:
    done = burnish("bench", "run", which, "mine=x")
    name = "data" if "checkout" in which else "checkout"
    said = f"BENCH: {name}: need a value, got none; give '{{kind: gedit, checkout: ..., data: ...}}"
    assert done.code == 2 and said in done.err and "pass" not in done.err


# --- Through a judge -------------------------------------------------------------------------


def test_the_official_judge_is_asked_as_officially_and_its_grades_become_a_tree(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn = pictures(tmp_path / "mine", checkout)
    picture(99, 1030).resize((1030, 20)).save(drawn / "1.png")
    server.reply = lambda body: f"<think>hm</think>{grades(body)}"
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found, asked = done.found, _taken(checkout)
    assert found["rows"][0]["models"]["mine"]["mean"] == 100
    assert found["models"]["mine"]["coverage"] == 1
    questions = sum(len(asked.bench.questions(item)) for item in asked.items)
    assert len(server.sent) == questions
    body = server.sent[0]
    wanted = {
        "model": "q-judger", "max_tokens": 4096, "temperature": 0.0, "top_p": 1.0, "top_k": 1,
        "repetition_penalty": 1.05, "seed": 42, "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip
    assert {key: body[key] for key in wanted} == wanted
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    sizes = set()
    for one in server.sent:
        parts = one["messages"][1]["content"]
        assert [part["type"] for part in parts] == ["text", "image_url", "text"]
        data = base64.b64decode(parts[1]["image_url"]["url"].partition(",")[2])
        sizes.add(images.decode(data, where="sent").size)
    assert sizes == {(32, 32), (1024, 1024)}


def test_a_finished_bench_is_not_judged_again_and_a_changed_picture_is(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    server.reply = grades
    first = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out, "--json")
    count = len(server.sent)
    again = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out, "--json")
    assert len(server.sent) == count
    last = [done.found for done in (first, again)]
    assert last[0] == last[1]
    picture(500).save(drawn / "3.png")
    burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    found = _taken(checkout)
    assert len(server.sent) - count == len(found.bench.questions(found.items[2]))


def test_an_interrupted_bench_goes_on_where_it_stopped(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    settings = yaml.safe_load(checkout.read_text())
    settings["judge"]["concurrency"] = 1
    checkout.write_text(yaml.safe_dump(settings))

    def slow(body: dict[str, Any]) -> str:
        time.sleep(0.05)
        return grades(body)

    server.reply = slow
    words = [sys.executable, "-m", "burnish", "bench", "run", str(checkout), f"mine={drawn}"]
    process = subprocess.Popen([*words, "--out", str(out)], stderr=subprocess.DEVNULL)
    while len(server.sent) < 12:
        time.sleep(0.02)
    # A second one beside it would pay for the same replies.
    beside = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert beside.code and "another process is running in it" in beside.err
    process.kill()
    process.wait()
    kept = next(out.glob("judged-*/mine/replies-0.jsonl"))
    known = kept.read_text().count("\n")
    # A line that was cut is asked again.
    with kept.open("a") as file:
        file.write('{"item": "1", "num')
    asked, total = len(server.sent), 0
    found = _taken(checkout)
    total = sum(len(found.bench.questions(item)) for item in found.items)
    assert 0 < known <= asked < total
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert done.code == 0, done.err
    assert len(server.sent) - asked == total - known


def test_lost_replies_make_a_result_invalid_until_they_are_asked_again(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    server.reply = lambda body: 500 if len(server.sent) <= 3 else grades(body)
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert done.code == 2
    assert "invalid result for mine" in done.err and "99% are needed" in done.err
    assert not json.loads((out / "bench.json").read_text())["models"]["mine"]["is_valid"]
    assert "has no valid result" in (out / "bench.html").read_text()
    count = len(server.sent)
    again = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert again.code == 0, again.err
    assert len(server.sent) - count == 3


def test_a_run_asks_again_where_its_judge_failed(
    server: Server, checkout: Path, tmp_path: Path
) -> None:
    config = load(
        RunConfig,
        recipe_path("smoke"),
        ["evaluation.num_steps=1", "benches={}", "arena=null"],
    )
    settings = parse(BenchChoice, {"bench": yaml.safe_load(checkout.read_text())}).bench
    config = config.model_copy(update={"benches": {"served": settings}})
    rt = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    server.reply = lambda body: 500
    with pytest.raises(RunError, match=r"benches\.served: need replies to 99% of \d+ questions"):
        run_job(config, tmp_path / "run", "bench/base", rt)
    assert not is_complete(tmp_path / "run", "bench/base")
    asked, server.reply = len(server.sent), grades
    run_job(config, tmp_path / "run", "bench/base", rt)
    assert is_complete(tmp_path / "run", "bench/base") and len(server.sent) > asked


def test_an_unreadable_reply_is_asked_again_only_where_that_is_wanted(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    server.reply = lambda body: "I would rather not" if len(server.sent) <= 3 else grades(body)
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", out).code == 2
    count = len(server.sent)
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", out).code == 2
    assert len(server.sent) == count
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out, "--again")
    assert done.code == 0, done.err
    assert len(server.sent) - count == 3


def test_a_judge_that_applies_nothing_gives_no_valid_result(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    """Every question has a verdict, and none of them a number; and a damaged result is no bar."""
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    out.mkdir()
    (out / "bench.json").write_text('["spread"]')
    server.reply = lambda body: grades(body).replace("2}", '"N/A"}')
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert done.code == 2 and "its verdicts say nothing about the whole" in done.err
    assert json.loads((out / "bench.json").read_text())["models"]["mine"]["coverage"] == 1


def test_a_question_that_the_server_refuses_is_lost_and_no_other(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    server.reply = lambda body: 400 if len(server.sent) == 3 else grades(body)
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert done.code == 2 and "the server refuses the question" in done.err
    kept = [json.loads(row) for row in next(out.glob("judged-*/mine/*.jsonl")).open()]
    assert sum("reply" in row for row in kept) == len(server.sent) - 1
    # A server that wants a token is another matter: what came before it is kept.
    server.reply = lambda body: 401
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", out)
    assert done.code == 2 and "need a token" in done.err


def test_another_prompt_is_asked_anew_and_drawn_anew(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn, out = pictures(tmp_path / "mine", checkout), tmp_path / "out"
    server.reply = grades
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", out).code == 0
    count = len(server.sent)
    settings = yaml.safe_load(checkout.read_text())
    checkout.write_text(yaml.safe_dump(settings | {"limit": 6}))
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", out).code == 0
    assert len(server.sent) == count
    checkout.write_text(yaml.safe_dump(settings | {"language": "cn"}))
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", out).code == 0
    assert len(server.sent) == 2 * count
    text = (tmp_path / "prompts.jsonl").write_text
    line = next(row for row in located("embedded:prompts/held-out.jsonl").open() if '"t2i"' in row)
    first, second = line, line.replace('"text": "', '"text": "now ')
    words = (
        "bench",
        "run",
        f"{{kind: miniature, prompts: {tmp_path}/prompts.jsonl, knowledge: null}}",
    )
    seen = []
    for rows in (first, first, second):
        text(rows)
        done = burnish(*words, "base=embedded:weights/base", "--out", tmp_path / "drawn")
        assert done.code == 0, done.err
        folder = tmp_path / "drawn" / "pictures" / "base"
        seen.append([path.read_bytes() for path in sorted(folder.glob("*.png"))])
    assert seen[0] == seen[1] != seen[2]


def test_servers_that_know_no_extras_are_sent_none(
    server: Server, checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    drawn = pictures(tmp_path / "mine", checkout)
    settings = yaml.safe_load(checkout.read_text()) | {"limit": 2}
    settings["judge"]["dialect"] = "openai"
    checkout.write_text(yaml.safe_dump(settings))
    server.reply = grades
    assert burnish("bench", "run", checkout, f"mine={drawn}", "--out", tmp_path / "o").code == 0
    assert set(server.sent[0]) == {
        "model", "messages", "max_tokens", "temperature", "top_p", "seed"
    }  # fmt: skip


def test_every_policy_of_a_run_is_measured_and_a_broken_picture_is_told(
    tmp_path: Path, burnish: Burnish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented command, on a run with a base alone, then with a picture that is none."""
    run = tmp_path / "run"
    Run.create(run, load(RunConfig, recipe_path("smoke")))
    bench = "{kind: miniature, limit: 12}"
    out = tmp_path / "out"
    done = burnish("bench", "run", bench, f"base={run}/base", "--out", out)
    assert done.code == 0, done.err
    guided = json.loads((out / "pictures" / "base" / "drawn.json").read_text())["how it draws"]
    assert '"guidance_scale": 2.0' in guided
    done = burnish("bench", "run", bench, run, "--out", out)
    assert done.code == 2 and "need a folder that a pipeline was saved in" in done.err
    mine = out / "pictures" / "base"
    sorted(mine.glob("*.png"))[0].write_bytes(b"no picture")
    done = burnish("bench", "run", bench, f"mine={mine}", "--out", out)
    assert done.code == 2 and "invalid result for mine" in done.err
    assert "has no valid result" in (out / "bench.html").read_text()
    picture(1, 33).save(sorted(mine.glob("*.png"))[0])
    done = burnish("bench", "run", bench, f"mine={mine}", "--out", out)
    assert done.code == 2 and "need a picture of 64 x 64 pixels, got 33 x 33" in done.err


# --- Without a judge, or with the wrong one --------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": {"url": "http://127.0.0.1:9", "model": "x", "retries": 0}}, "need a judge at"),
        ({"judge": {"url": "URL", "model": "q-judge"}}, "did you mean 'q-judger'"),
        ({"checkout": "/nowhere"}, "need a readable file /nowhere/checklists.py"),
        ({"num_image": 1}, "did you mean"),
        ({"kind": "qwen_bench"}, "qwen_image_bench"),
    ],
)
def test_what_is_missing_is_one_line(
    change: dict[str, Any],
    message: str,
    server: Server,
    checkout: Path,
    tmp_path: Path,
    burnish: Burnish,
) -> None:
    drawn = pictures(tmp_path / "mine", checkout)
    settings = yaml.safe_load(checkout.read_text()) | change
    if (settings.get("judge") or {}).get("url") == "URL":
        settings["judge"]["url"] = server.url
    checkout.write_text(yaml.safe_dump(settings))
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", tmp_path / "out")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and message in done.err, done.err


def test_without_a_judge_the_official_program_is_next(
    checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    settings = yaml.safe_load(checkout.read_text())
    checkout.write_text(yaml.safe_dump(settings | {"judge": None}))
    drawn = pictures(tmp_path / "mine", checkout)
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", tmp_path / "out")
    assert done.code == 0 and f"Pictures of mine: {drawn}" in done.out
    assert "then `burnish bench read`" in done.out


def test_missing_pictures_are_named(checkout: Path, tmp_path: Path, burnish: Burnish) -> None:
    drawn = pictures(tmp_path / "mine", checkout)
    (drawn / "5.png").unlink()
    done = burnish("bench", "run", checkout, f"mine={drawn}", "--out", tmp_path / "out")
    assert done.code == 2
    assert "got 1 missing, such as 5.png" in done.err


def test_the_released_file_is_read_without_any_judge(
    checkout: Path, tmp_path: Path, burnish: Burnish
) -> None:
    settings = yaml.safe_load(checkout.read_text())
    checkout.write_text(yaml.safe_dump(settings | {"judge": None}))
    out = tmp_path / "out"
    done = burnish("bench", "read", checkout, settings["prompts"], "--out", out, "--base", "one")
    # Some of the reference's replies cannot be read, so the result is marked.
    assert done.code == 2 and "invalid result" in done.err and "--again" not in done.err
    found = json.loads((out / "bench.json").read_text())
    assert set(found["models"]) == {"one", "two"} and found["rows"][0]["gains"]["two"]["mean"]


# --- The miniature ---------------------------------------------------------------------------


def test_a_model_of_a_run_is_drawn_as_in_the_run(tmp_path: Path, burnish: Burnish) -> None:
    """With its seed and its precision: the pictures are the same to the last bit."""
    run, out = tmp_path / "run", tmp_path / "out"
    changes = [
        "evaluation.seed=7",
        "runtime.dtype=bfloat16",
        "benches={t2i: {kind: miniature, limit: 4}}",
    ]
    config = load(RunConfig, recipe_path("smoke"), [*changes, "arena=null"])
    Run.create(run, config)
    rt = config.runtime.build()
    run_job(config, run, "bench/base", rt)
    done = burnish(
        "bench", "run", "{kind: miniature, limit: 4}", f"base={run / 'base'}", "--out", out
    )
    assert done.code == 0, done.err
    there, here = run / "benches/base/t2i/pictures", out / "pictures" / "base"
    names = sorted(file.name for file in here.glob("*.png"))
    assert len(names) == 4
    assert all((there / n).read_bytes() == (here / n).read_bytes() for n in names)


def test_the_same_seed_draws_the_same_pictures_and_gives_the_same_numbers(
    tmp_path: Path, burnish: Burnish, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32 on every processor.
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    results, drawn = [], []
    for name in ("first", "second"):
        out = tmp_path / name
        done = burnish(
            "bench",
            "run",
            "{kind: miniature, limit: 12}",
            "base=embedded:weights/base",
            "--out",
            out,
        )
        assert done.code == 0, done.err
        results.append(json.loads((out / "bench.json").read_text()))
        files = sorted((out / "pictures" / "base").glob("*.png"))
        drawn.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert results[0] == results[1] and drawn[0] == drawn[1] and len(drawn[0]) == 12
    # An unfinished folder: only what is missing is drawn and judged.
    out = tmp_path / "second"
    lost = sorted((out / "pictures" / "base").glob("*.png"))[0]
    was = np.asarray(images.read(lost), dtype=int)
    lost.unlink()
    burnish(
        "bench", "run", "{kind: miniature, limit: 12}", "base=embedded:weights/base", "--out", out
    )
    # Drawn alone, not beside eleven others: some processors round the last bit otherwise.
    assert int(np.abs(np.asarray(images.read(lost), dtype=int) - was).max()) <= 1
    kept = next(out.glob("judged-*/base/replies-0.jsonl")).read_text()
    assert kept.count("\n") == 12 + (hashlib.sha256(lost.read_bytes()).hexdigest() != drawn[0][0])
    other = burnish(
        "bench", "run", "{kind: miniature, limit: 12}", "base=embedded:weights/base", "--out", out,
        "--seed", "1",
    )  # fmt: skip
    assert other.code == 2 and "need how it draws as" in other.err


# --- The numbers -----------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Any:
    """A tree of a whole and six tasks, each a mean over prompts."""

    class Flat(Geneval):
        def averages(self) -> dict[Node, Sequence[Node]]:
            return {}

    CHECKOUTS["geneval"](tmp_path)
    return Flat(tmp_path / "prompts" / "evaluation_metadata.jsonl")


def scores(values: np.ndarray) -> Scores:
    return Scores(values, np.ones_like(values), 1, {})


def test_differences_are_paired_by_prompt(flat: Any) -> None:
    """Prompts differ a hundred times as much as the models do, which pairing takes out."""
    rng = np.random.default_rng(0)
    hard = 20 * rng.standard_normal((80, 1)) + 50 + np.zeros((80, 7))
    models = {
        "base": scores(hard),
        "other": scores(hard + 0.5 + 0.2 * rng.standard_normal((80, 7))),
    }
    found = tabulate(flat, models, "base")
    row = found["rows"][0]
    assert row["gains"]["other"]["low"] > 0.4 and row["gains"]["other"]["p"] < 0.001
    own = row["models"]["other"]
    assert own["high"] - own["low"] > 5


def test_pillars_are_held_to_holm_and_the_whole_is_not(flat: Any) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal((60, 7))
    models = {"base": scores(base), "other": scores(base + 0.3 * rng.standard_normal((60, 7)))}
    found = tabulate(flat, models, "base")["rows"]
    ones = np.ones(60)
    for k, row in enumerate(found):
        gain = row["gains"]["other"]
        wanted = means(flat, models["other"], ones)[k] - means(flat, models["base"], ones)[k]
        assert gain["mean"] == pytest.approx(wanted)
    pillars = [row["gains"]["other"]["p"] for row in found[1:]]
    whole = found[0]["gains"]["other"]["p"]
    assert all(p >= 6 * 2 / (RESAMPLES + 1) or p == 1 for p in pillars) and 0 < whole <= 1


def test_an_average_of_tasks_has_no_interval_where_a_task_is_small(tmp_path: Path) -> None:
    CHECKOUTS["geneval"](tmp_path)
    bench = Geneval(tmp_path / "prompts" / "evaluation_metadata.jsonl")
    rng = np.random.default_rng(5)

    def of_tasks(*counts: int) -> Scores:
        weight = np.zeros((sum(counts), 7))
        weight[np.arange(sum(counts)), 1 + np.repeat(np.arange(len(counts)), counts)] = 1
        return Scores(weight * rng.random(weight.shape), weight, 1, {})

    for counts, is_told in (((12, 12, 12, 12, 12, 12), True), ((40, 2, 12, 12, 12, 12), False)):
        row = tabulate(bench, {"base": of_tasks(*counts)}, "base")["rows"][0]
        assert (row["models"]["base"]["low"] is not None) == is_told
    # A bench that is asked in part may leave whole tasks out.
    row = tabulate(bench, {"base": of_tasks(40, 0, 40)}, "base")["rows"][0]
    assert row["models"]["base"]["low"] is not None


def test_few_prompts_have_no_interval(flat: Any) -> None:
    values = np.ones((9, 7))
    found = tabulate(flat, {"base": scores(values)}, "base")["rows"][0]
    assert found["models"]["base"] == {"mean": 1.0, "low": None, "high": None, "num_prompts": 9}
