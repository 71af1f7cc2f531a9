"""The examination of a judge: what it measures, what it refuses, what its page shows."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from burnish import images
from burnish.annotations.base import write_annotations
from burnish.annotations.schema import Annotation
from burnish.cli import main
from burnish.config import ConfigError
from burnish.judges import concordance, trust
from burnish.judges.concordance import Interval, spearman, within_prompt
from burnish.judges.probes import PROBES
from burnish.judges.trust import (
    Examination,
    Reading,
    TrustConfig,
    _agreement,
    _error_variances,
    _opinions,
    examine,
)
from burnish.pages.trust import write_trust_report
from burnish.rewards.vlm import Judge
from burnish.types import Failed, Scored


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Intervals have laws of their own; a thousand resamples are most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "interval", partial(concordance.interval, resamples=100))
        yield


def annotation(number: int) -> Annotation:
    """A grey picture whose brightness is its quality; four pictures share a prompt."""
    score = 1 + (number * 7 % 17) / 4
    shade = Image.new("RGB", (32, 32), (round(50 * score),) * 3)
    return Annotation(
        id=f"picture-{number}",
        prompt=f"<b>prompt</b> {number // 4}",
        output=images.encode_png(shade),
        dimension="alignment",
        score_mean=score,
        score_std=0.3,
        num_raters=5,
        reasoning="<script>raters</script> said so",
        pair_group=f"group {number // 4}",
        licence="Apache-2.0",
        origin="test",
    )


SOME = [annotation(number) for number in range(80)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("annotated") / "some.jsonl"
    write_annotations(path, SOME)
    return path


def settings(file: Path, **changes: object) -> TrustConfig:
    given = {"annotations": [{"path": str(file)}], "held_out": False, "probed": 20}
    return TrustConfig.model_validate({**given, **changes})


@pytest.fixture(scope="module")
def found(small_judge: Path, file: Path) -> Examination:
    (examination,) = examine(Judge.load(small_judge), SOME, settings(file))
    return examination


def test_a_judge_of_brightness_agrees_with_raters_of_brightness(found: Examination) -> None:
    metrics = found.metrics
    assert metrics["spearman"].value > 0.7 and metrics["within_prompt"].value > 0.5
    assert metrics["spearman"].low < metrics["spearman"].value <= metrics["spearman"].high
    assert metrics["spearman_ceiling"].value > 0.9
    assert metrics["failed"].value == 0 and metrics["mass"].value > 0.9
    # The judge's own scale is compressed; a map fitted on other prompts mends most of it.
    assert metrics["calibration_error"].value < 0.5
    # Resamples add chance to what chance has added: not even nothing would lie in their interval.
    assert np.isnan(metrics["calibration_error"].low) and np.isnan(
        metrics["calibration_error"].high
    )
    assert found.to_json()["calibration_error"]["low"] is None


def test_a_prompt_is_one_unit_however_many_comparisons_it_stands_in() -> None:
    """Public sets give every two pictures a comparison of their own, whose prompt is another's."""
    rng = np.random.default_rng(0)
    some = SOME[:40]
    raw = [float(np.clip((a.score_mean or 0) + rng.normal(0, 1), 1, 5)) for a in some]

    def agreed(group: Callable[[int], str | None]) -> dict[str, Interval]:
        return _agreement(
            [
                Reading(
                    replace(a, pair_group=group(n)),
                    Scored(value=raw[n], detail={"raw": raw[n], "mass": 1.0}),
                )
                for n, a in enumerate(some)
            ]
        )

    loose, apart = agreed(lambda n: None), agreed(lambda n: f"pair {n // 2}")
    changed = {name for name, found in loose.items() if found != apart[name]}
    assert changed == {"pair_accuracy", "pair_accuracy_with_ties"}


def rated(truth: np.ndarray, raters: int) -> list[Reading]:
    """Pictures, five of a prompt, by what raters with an error of one point said on average."""
    said = truth[:, None] + np.random.default_rng(1).normal(0, 1, (len(truth), raters))
    return [
        Reading(
            replace(
                SOME[0],
                id=str(n),
                prompt=str(n // 5),
                score_mean=float(own.mean()),
                score_std=float(own.std()),
                num_raters=raters,
            ),
            Scored(value=float(truth[n]), detail={"raw": float(truth[n]), "mass": 1.0}),
        )
        for n, own in enumerate(said)
    ]


@pytest.mark.parametrize(("raters", "shared"), [(5, 0.0), (5, 1.0), (9, 2.0)])
def test_the_ceiling_is_what_a_judge_reaches_that_knows_the_opinion_behind_the_means(
    raters: int, shared: float
) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.normal(0, shared, 400), 5) + rng.normal(3, 0.7, 2000)
    read = rated(truth, raters)
    means = np.asarray([r.annotation.score_mean for r in read])
    prompts = np.arange(2000) // 5
    errors = _error_variances([r.annotation for r in read])
    assert errors is not None and errors.mean() == pytest.approx(1 / raters, rel=0.05)
    for statistic, units in ((spearman, 0 * prompts), (within_prompt, prompts)):
        told = statistic(_opinions(means, errors, units), means, prompts)
        assert told == pytest.approx(statistic(truth, means, prompts), abs=0.03)


@pytest.mark.parametrize("unknown", [{"score_std": None}, {"num_raters": 1}])
def test_nobody_knows_the_ceiling_of_raters_whose_spread_is_not_told(
    unknown: dict[str, Any],
) -> None:
    first, *others = rated(np.linspace(1, 5, 10), 3)
    found = _agreement([replace(first, annotation=replace(first.annotation, **unknown)), *others])
    assert np.isnan(found["spearman_ceiling"].value) and found["spearman"].value > 0
    assert np.isnan(found["within_prompt_ceiling"].value)


def test_asking_again_in_other_company_changes_next_to_nothing(found: Examination) -> None:
    assert 0 <= found.metrics["repeat_noise"].value < 1e-3


def test_every_probe_is_tried_and_a_margin_of_light_brightens(found: Examination) -> None:
    assert set(found.probes) == set(PROBES)
    assert found.probes["jpeg"]["moved"].value < 0.1
    assert found.probes["padding"]["shift"].value > found.probes["jpeg"]["shift"].value


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_keeps_the_size_and_changes_the_picture(name: str) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    changed = PROBES[name](picture)
    assert changed.size == picture.size and changed.mode == "RGB"
    assert changed.tobytes() != picture.tobytes()
    assert PROBES[name](picture).tobytes() == changed.tobytes()


def test_the_page_holds_everything_and_escapes_what_others_wrote(
    small_judge: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(small_judge), f"annotations=[{{path: {file}}}]", "held_out=false"]
    quick = ["probed=8", "limit=40", "--out", str(tmp_path / "page"), "--json"]
    code = main(["reward", "report", *given, *quick])
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert code == 0 and last["dimensions"]["alignment"]["spearman"]["value"] > 0.8
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("data:image/webp") >= 6 and "Worst disagreements" in page
    assert "<script>" not in page and "<b>prompt</b>" not in page
    assert "http:" not in page and "https:" not in page
    kept = json.loads((tmp_path / "page" / "report.json").read_text())
    assert kept["dimensions"] == last["dimensions"]


def test_a_dimension_that_cannot_be_judged_does_not_take_the_page_of_the_others(
    small_judge: Path, found: Examination, tmp_path: Path
) -> None:
    failed = tuple(replace(reading, score=Failed(reason="lost")) for reading in found.readings)
    sure = Interval(1.0, 1.0, 1.0)
    lost = Examination("portrait", failed, {"failed": sure}, {})
    judge = Judge.load(small_judge)
    judge = replace(judge, rubrics={**judge.rubrics, "portrait": judge.rubrics["alignment"]})
    page = write_trust_report(tmp_path, "judge", judge, [found, lost], worst=2).read_text()
    assert "portrait: 100.0 % of the pictures could not be judged" in page and "missing" in page
    head, *rows = re.findall(r"<tr>.*?</tr>", page[page.index('id="agreement"') :], re.DOTALL)[:3]
    assert [row.count("<td") + row.count("<th") for row in rows] == 2 * [head.count("<th")]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["reward", "report", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_cannot_be_examined_is_one_line(
    small_judge: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    copy_with: Callable[[dict[str, object]], Path],
) -> None:
    given = f"annotations=[{{path: {file}}}]"
    assert "need the folder of a judge" in refused([str(tmp_path), given], capsys)
    assert "without `split`" in refused([str(small_judge), given], capsys)
    none = copy_with({"split": {"held_out": 0.0, "seed": 0}})
    assert "got none among 80" in refused([str(none), given], capsys)
    wrong = refused([str(small_judge), given, "dimensions=[aligment]", "held_out=false"], capsys)
    assert "did you mean 'alignment'" in wrong
    other = tmp_path / "other.jsonl"
    write_annotations(other, [replace(SOME[0], dimension="portrait")])
    said = refused([str(small_judge), f"annotations=[{{path: {other}}}]", "held_out=false"], capsys)
    assert "in a dimension of the judge (alignment)" in said


def test_only_held_out_prompts_are_read(
    file: Path,
    copy_with: Callable[[dict[str, object]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_with({"split": {"held_out": 0.5, "seed": 0}})
    arguments = [str(folder), f"annotations=[{{path: {file}}}]", "probed=4", "--json"]
    assert main(["reward", "report", *arguments, "--out", str(tmp_path / "page")]) == 0
    count = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["dimensions"]["alignment"]
    assert 0 < count["count"] < len(SOME)


def test_a_judge_that_scores_nothing_is_refused_and_its_fast_mode_may_still_work(
    small_judge: Path, file: Path
) -> None:
    judge = replace(Judge.load(small_judge), longest_answer=1)
    with pytest.raises(ConfigError, match="need scores of at least two pictures in a dim"):
        examine(judge, SOME, settings(file, limit=20, probed=2))
    (fast,) = examine(judge, SOME, settings(file, limit=20, probed=2, reasoning=False))
    assert all(isinstance(reading.score, Scored) for reading in fast.readings)
