"""Stages in child processes, cached by content, written atomically."""
