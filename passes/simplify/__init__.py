"""Passes that change a graph's spelling, never its operators' meaning."""
