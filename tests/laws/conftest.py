"""Settings shared by the law tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# Derandomised: a law that fails must fail again in the next run, on any machine.
settings.register_profile("laws", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("laws")
