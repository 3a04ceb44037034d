"""What every builder returns, and how every builder writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.engines.processor import MOST_WEIGHT_BITS, WEIGHT_BITS

_TO_BYTES = ("QuantizeLinear", "DynamicQuantizeLinear")
"""Operators that make activations integers."""


@dataclass(frozen=True)
class BuiltEngine:
    """A built engine.

    Attributes:
        files: names in the folder that was given; the backend opens the first.
        options: what the session has to tell the backend, as JSON values.
        built_with: versions of the packages that decide whether another machine can read the engine.
        seconds: wall time of the build.
        details: figures that only this backend has, as JSON values.
    """

    files: tuple[str, ...]
    options: dict[str, Any]
    built_with: dict[str, str]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@contextmanager
def staging(folder: Path, files: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write in; on success `files` move from it into `folder`, and whatever happens it is removed."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
        yield Path(temporary)
        for name in files:
            (Path(temporary) / name).replace(folder / name)


def weights_path(path: Path) -> Path:
    """Where the weights of the model in `path` lie: beside it in ``<name>_data``, as optimum has them."""
    return path.with_name(f"{path.name}_data")


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write a model with its weights beside it (`weights_path`); the model is not changed."""
    ir.save(model, path, external_data=weights_path(path).name)


def weight_bits_option(model: ir.Model) -> dict[str, int]:
    """The option `WEIGHT_BITS` of an engine that multiplies bytes, by the largest weight; none of any other engine."""
    if not any(node.op_type in _TO_BYTES for node in model.graph):
        return {}
    constants = (value.const_value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8)
    weights = (each for each in constants if each is not None and len(each.shape) > 1)  # the others are zero points
    largest = max((_magnitude(weight.numpy()) for weight in weights), default=0)
    return {WEIGHT_BITS: MOST_WEIGHT_BITS if largest >= 2 ** (MOST_WEIGHT_BITS - 2) else MOST_WEIGHT_BITS - 1}


def _magnitude(integers: np.ndarray) -> int:
    return max(int(integers.max()), -int(integers.min()))


def one_line(error: object, *, limit: int = 600) -> str:
    """A backend's message without its line breaks, cut at `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
