"""Sizes as expressions: what a graph computes about shapes, resolved."""
