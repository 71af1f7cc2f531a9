"""Time of intervals for a leaderboard: 10,000 resamples of 100,000 votes.

    python benchmarks/ratings.py [--votes 100000] [--resamples 10000] [--players 10] [--json]

The votes fall on 2,000 prompts, which are what is drawn again. Adding up votes, drawing and fitting
are timed apart; the fit is one batch of Newton's method over all resamples.
"""

import argparse
import json
import time

import numpy as np

from burnish import ratings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--votes", type=int, default=100_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--players", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=2_000)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    arguments = parser.parse_args()
    rng, num = np.random.default_rng(0), arguments.players
    strength = rng.normal(0, 0.7, num)
    left = rng.integers(0, num, arguments.votes)
    right = (left + rng.integers(1, num, arguments.votes)) % num
    score = (rng.random(arguments.votes) < 1 / (1 + np.exp(strength[right] - strength[left]))) * 1.0
    score[rng.random(arguments.votes) < 0.15] = 0.5
    prompt = rng.integers(0, arguments.prompts, arguments.votes)
    marks = [time.perf_counter()]
    clusters = ratings.tally(left, right, score, num, prompt)
    marks.append(time.perf_counter())
    again = ratings.with_upsets(ratings.resampled(clusters, arguments.resamples), clusters)
    marks.append(time.perf_counter())
    fitted = ratings.fit(again, prior=ratings.RESAMPLE_PRIOR, has_side=True)
    low, high = ratings.interval(fitted.elo(0))
    marks.append(time.perf_counter())
    parts = dict(zip(("tally", "resample", "fit"), np.diff(marks).tolist(), strict=True))
    width = float((high - low)[1:].mean())
    print(f"{arguments.resamples:,} resamples of {arguments.votes:,} votes between {num} players\n")
    print("| tally s | resample s | fit s | all s | mean width of an interval, Elo |")
    print("|---|---|---|---|---|")
    cells = [f"{seconds:.2f}" for seconds in (*parts.values(), sum(parts.values()))]
    print(f"| {' | '.join(cells)} | {width:.1f} |")
    if arguments.json:
        print(json.dumps({**parts, "total": sum(parts.values()), "width": width}))


if __name__ == "__main__":
    main()
