"""What can be read out of one engine file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: name, element type and sizes, where a string is a free size ("?" if it has no name)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk.

    Attributes:
        path: the file that a backend opens.
        format: "ONNX", "OpenVINO IR" or "TensorRT plan".
        bytes: size of the file and of those beside it that hold its weights.
        inputs: empty where the format does not tell; likewise ``outputs``.
        operators: number of nodes by operator, ``domain::Operator`` outside the standard domain; most frequent first.
            For a plan: the kernels that TensorRT chose, under its own names.
        fused: nodes that call a fused operator of domain ``sdc``, by operator; they are among ``operators`` too.
        weights: number of stored values by element type; for a plan, bytes.
        properties: what else the file says of itself, in words.
        notes: what it does not say, and why.
    """

    path: str
    format: str
    bytes: int
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)
    fused: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return sum(self.operators.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "nodes": self.nodes}


def most_frequent_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The same counts in a fixed order: falling, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
