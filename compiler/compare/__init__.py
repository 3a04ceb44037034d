"""Two bundles, or two ONNX files, side by side: graphs, outputs, pictures and times."""
