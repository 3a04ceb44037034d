"""Graph passes over onnx_ir: canonical, fused, typed, lowered. `pipeline` holds their order."""
