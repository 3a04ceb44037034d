"""Ranges of activations from denoising runs."""
