"""Torch modules to ONNX graphs."""
