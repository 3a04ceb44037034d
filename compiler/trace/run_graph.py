"""Runs graphs of any exporter with one set of inputs, and says how far their outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from sdc.compiler.trace.check import Arrays

_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


def run_graph(path: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
    """Outputs by name for each of the feeds, on ONNX Runtime without its optimisations.

    Feeds are converted to the type that the graph takes, and a timestep loses its dimension where the graph has none.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def fit(each: Arrays) -> Arrays:
        given = {}
        for value in session.get_inputs():
            array = each[value.name].astype(_TYPES[value.type])
            given[value.name] = array if array.ndim == len(value.shape) else array.reshape(())
        return given

    return [dict(zip(names, session.run(names, fit(each)), strict=True)) for each in feeds]


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value; infinity where `found` is not finite.

    Raises:
        ValueError: the shapes differ, or `expected` is not finite: no difference to it means anything.
    """
    if found.shape != expected.shape:
        raise ValueError(f"shapes {found.shape} and {expected.shape} differ")
    if not np.isfinite(expected).all():
        raise ValueError("the source graph gives NaN or infinity")
    if not np.isfinite(found).all():
        return float("inf")
    wanted = expected.astype(np.float64)
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())
