"""Writes `arena_rank_reference.json`: ratings of random tournaments by lmarena's arena-rank.

It wants another NumPy than Burnish, so it runs in an environment of its own:

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install arena-rank==0.1.1
    /tmp/oracle/bin/python tests/laws/arena_rank_reference.py
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from arena_rank.models.bradley_terry import BradleyTerry
from arena_rank.utils.data_utils import PairDataset

CASES = [(seed, 3 + seed, 500 + 300 * seed) for seed in range(6)]


def main() -> None:
    found = []
    for seed, players, votes in CASES:
        # As `votes` in test_ratings.py.
        rng = np.random.default_rng(seed)
        strength = rng.normal(0, 0.7, players)
        left = rng.integers(0, players, votes)
        right = (left + rng.integers(1, players, votes)) % players
        chance = 1 / (1 + np.exp(-(strength[left] - strength[right])))
        score = (rng.random(votes) < chance).astype(float)
        score[rng.random(votes) < 0.2] = 0.5
        names = [f"p{number:02d}" for number in range(players)]
        winner = np.select([score == 1, score == 0], ["model_a", "model_b"], "tie")
        table = pd.DataFrame(
            {
                "model_a": [names[place] for place in left],
                "model_b": [names[place] for place in right],
                "winner": winner,
            }
        )
        data = PairDataset.from_pandas(table)
        model = BradleyTerry(n_competitors=len(data.competitors))
        rated = model.compute_ratings_and_cis(data)
        by_name = dict(zip(rated["competitors"], rated["ratings"], strict=True))
        found.append(
            {
                "seed": seed,
                "players": players,
                "votes": votes,
                "ratings": [round(float(by_name[name]), 4) for name in names],
            }
        )
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
