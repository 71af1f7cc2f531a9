"""Benches: one file each, whose name is its key; `burnish.bench.base` has what they share."""
