"""Burnish post-trains flow-matching image models by RL and on-policy distillation."""

__version__ = "0.1.0"
