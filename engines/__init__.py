"""The thin runtime."""
