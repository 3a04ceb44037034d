"""Sides of `bench_peers.py`: each `*_side.py` runs in an environment of its own; the rest runs beside the script."""
