"""The proof that every pass has to give: the graph computes the same before and after.

Runs on ONNX Runtime with its own optimisations off, so that nothing repairs or hides what a pass did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from sdc.passes.base import Pass, PassReport
from sdc.passes.shapes.infer_shapes import InferShapes

FP32 = 1e-5
"""Largest relative error of a rewrite that computes the same in another order."""

Feeds = Mapping[str, np.ndarray]


def make_model(text: str, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """A checked model from ONNX's textual syntax, with initialisers and with the shapes of all values."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    for name, array in weights.items():
        value = next(value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        model.graph.register_initializer(value)
    onnx.checker.check_model(ir.to_proto(model))
    InferShapes().run(model)
    return model


def operators(model: ir.Model) -> list[str]:
    """The graph's operators in order; those of other domains with their domain."""
    return [f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph]


def run_model(model: ir.Model, feeds: Feeds) -> dict[str, np.ndarray]:
    """All outputs; functions are run as they stand in the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def relative_error(model: ir.Model, expected: Mapping[str, np.ndarray], feeds: Feeds) -> float:
    """Largest difference over all outputs, each relative to its output's largest magnitude."""
    actual = run_model(model, feeds)
    assert list(actual) == list(expected)
    errors = []
    for name, value in expected.items():
        assert actual[name].shape == value.shape, f"{name}: not equal, its shape is {actual[name].shape}"
        assert actual[name].dtype == value.dtype, f"{name}: not equal, its type is {actual[name].dtype}"
        assert np.all(np.isfinite(value)), name
        assert np.std(value) > 0, f"{name} is constant: equality would prove nothing"
        errors.append(np.max(np.abs(actual[name].astype(np.float64) - value)) / np.max(np.abs(value)))
    return float(max(errors))


def apply_proven(
    passes: Pass | Sequence[Pass], model: ir.Model, feeds: Sequence[Feeds], *, tolerance: float = FP32
) -> list[PassReport]:
    """Run passes on `model` in place; fail unless it stays valid and equal for all feeds, and a second run is idle."""
    passes = [passes] if isinstance(passes, Pass) else list(passes)
    expected = [run_model(model, each) for each in feeds]
    reports = [each.run(model) for each in passes]
    onnx.checker.check_model(ir.to_proto(model), full_check=all(not name for name in model.graph.opset_imports))
    for each, outputs in zip(feeds, expected, strict=True):
        error = relative_error(model, outputs, each)
        assert error <= tolerance, f"not equal: the relative error is {error:.1e}"
    after = operators(model)
    for each in passes:
        each.run(model)
    assert operators(model) == after, "not idempotent"
    return reports
