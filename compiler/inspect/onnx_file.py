"""ONNX files: read with the weights left on disk, so that gigabytes take moments."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from sdc.compiler.inspect.engine_file import EngineFile, TensorInfo, most_frequent_first
from sdc.engines.errors import InputError
from sdc.passes.domain import DOMAIN

DAMAGED = "it may be truncated: copy it again"


def inspect_onnx(path: Path) -> EngineFile:
    """Describe an ONNX file.

    Raises:
        InputError: the file is no ONNX model, or the weights beside it are missing or too short.
    """
    model = _load(path)
    operators: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        operators[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
    weights: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise InputError(f"{path}: the weight {name!r} has no values", hint="the file is damaged: make it again")
        weights[value.const_value.dtype.numpy().name] += value.const_value.size
    opsets = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in model.opset_imports.items())
    producer = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    return EngineFile(
        path=str(path),
        format="ONNX",
        bytes=path.stat().st_size + sum(file.stat().st_size for file in _weight_files(model, path)),
        inputs=tuple(_tensor_info(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_info(value) for value in model.graph.outputs),
        operators=most_frequent_first(operators),
        fused=most_frequent_first(
            {
                name.removeprefix(f"{DOMAIN}::"): count
                for name, count in operators.items()
                if name.startswith(f"{DOMAIN}::")
            }
        ),
        weights=most_frequent_first(weights),
        properties={"opsets": opsets, **({"producer": producer} if producer else {})},
    )


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}", hint="give an .onnx file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each have their own for a file that is none
        raise InputError(f"{path} is no ONNX model: {_first_line(error)}", hint=DAMAGED) from error
    if not len(model.graph) and not model.graph.outputs:
        raise InputError(f"{path} is no ONNX model: it has no graph", hint=DAMAGED)
    return model


def weight_files(path: Path) -> list[Path]:
    """Files beside an ONNX file that hold its weights.

    Raises:
        InputError: it is no ONNX model, or a file is missing or too short.
    """
    return _weight_files(_load(path), path)


def _weight_files(model: ir.Model, path: Path) -> list[Path]:
    """Files that hold external weights, after checking that every weight lies inside its file."""
    ends: dict[Path, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            file = path.parent / tensor.location
            ends[file] = max(ends.get(file, 0), (tensor.offset or 0) + (tensor.length or tensor.nbytes))
    for file, end in ends.items():
        if not file.is_file():
            raise InputError(f"{path} has its weights in {file}, which is missing", hint="copy it beside the model")
        if file.stat().st_size < end:
            raise InputError(
                f"{file} should have {end:,} bytes or more, found {file.stat().st_size:,}",
                hint="it is truncated: copy it again",
            )
    return list(ends)


def _tensor_info(value: ir.Value) -> TensorInfo:
    shape = () if value.shape is None else tuple(_size(size) for size in value.shape)
    return TensorInfo(value.name or "?", "?" if value.dtype is None else value.dtype.numpy().name, shape)


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value or "?")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
