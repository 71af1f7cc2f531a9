"""How far the conditional velocities of trained policies are from the base's, by noise level.

python docs/studies/drift.py runs/studies/runaway/seed-1

Held-out prompts of text to image; the states are clean latents that the base draws, noised again.
"""

import sys
from pathlib import Path

import torch

from burnish.config import located
from burnish.flow import add_noise
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig

LEVELS = (0.95, 0.6, 0.3, 0.1)
COUNT = 24


def main(run: str) -> None:
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    every = read_prompts(located("embedded:prompts/held-out.jsonl"))
    prompts = [prompt for prompt in every if prompt.task == "t2i"][: 2 * COUNT : 2]
    config = RolloutConfig(num_steps=6, guidance_scale=2.0, group_size=1, window=0, keep="none")
    groups = sample(base, prompts, config, seed=0, step=0, is_decoded=False)
    clean = torch.stack([group.trajectories[0].clean for group in groups])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    stages = sorted(path.parent for path in Path(run).glob("stages/*/model"))
    policies = {s.name: QwenImage21Policy.load(s / "model", resolution=64) for s in stages}
    print("| noise level | size of the base's |", " | ".join(policies), "|")
    print("|---|---|" + "---|" * len(policies))
    with torch.no_grad():
        own = {name: p.prefix(p.encode(prompts)) for name, p in policies.items()}
        start = base.prefix(base.encode(prompts))
        for level in LEVELS:
            sigmas = torch.full((COUNT,), level)
            states = add_noise(clean, noise, sigmas)
            before = base.velocity(states, sigmas, start)
            moved = [p.velocity(states, sigmas, own[name]) - before for name, p in policies.items()]
            sizes = [float(each.square().mean().sqrt()) for each in (before, *moved)]
            print(f"| {level} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
