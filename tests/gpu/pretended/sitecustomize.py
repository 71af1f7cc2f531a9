"""Imported by every Python process that has this folder on its path, before anything else."""

import os

if os.environ.get("BURNISH_PRETENDED_GPU"):
    import pretended_gpu  # noqa: F401
