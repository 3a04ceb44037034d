"""OpenVINO's intermediate representation: an .xml with the graph, a .bin of the same name with the weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from sdc.compiler.inspect.engine_file import EngineFile, TensorInfo, most_frequent_first
from sdc.engines.errors import InputError
from sdc.engines.sessions.openvino_core import openvino_core

NO_WORK = ("Parameter", "Result", "Constant")
"""Node types that compute nothing; they are not counted."""


def inspect_openvino(path: Path) -> EngineFile:
    """Describe an OpenVINO IR.

    Raises:
        InputError: the .xml is no such graph, or its .bin is missing or too short.
    """
    weight_file = path.with_suffix(".bin")
    if not weight_file.is_file():
        raise InputError(f"{path} has its weights in {weight_file}, which is missing", hint="copy it beside the .xml")
    try:
        model = openvino_core().read_model(path)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
        raise InputError(f"{path} is no OpenVINO model: {reason}", hint="it may be truncated: copy it again") from error
    operators: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind not in NO_WORK:
            operators[kind] += 1
        elif kind == "Constant":
            weights[node.get_output_element_type(0).get_type_name()] += math.prod(node.get_output_shape(0))
    return EngineFile(
        path=str(path),
        format="OpenVINO IR",
        bytes=path.stat().st_size + weight_file.stat().st_size,
        inputs=tuple(_tensor_info(port) for port in model.inputs),
        outputs=tuple(_tensor_info(port) for port in model.outputs),
        operators=most_frequent_first(operators),
        weights=most_frequent_first(weights),
    )


def _tensor_info(port: Any) -> TensorInfo:
    sizes = tuple(size.get_length() if size.is_static else "?" for size in port.get_partial_shape())
    return TensorInfo(port.get_any_name(), port.get_element_type().get_type_name(), sizes)
