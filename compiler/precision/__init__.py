"""Precisions of an export: what targets run, which plan a request stands for, where float16 breaks."""
