"""What a component takes and gives: names, element types, shapes, and the range of every free dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdc.engines.errors import InputError

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
"""Names of the components of a Stable Diffusion pipeline; also their folders in a bundle."""

HOISTED = ("unet_prompt", "unet_timestep")
"""Engines beside a UNet that work was hoisted out of: one runs once for a picture, one once for each timestep."""

SHALLOW = "unet_shallow"
"""The engine that runs in the UNet's place at most steps of DeepCache: it takes the deep features of a step before."""

_SHARD = "unet_shard_"


def shard_name(index: int) -> str:
    """The engine of a UNet's shard, counted from 0; the shards stand in the place of the UNet's engine."""
    return f"{_SHARD}{index}"


def is_shard_name(name: str) -> bool:
    """Whether an engine is a shard of the UNet."""
    number = name.removeprefix(_SHARD)
    return name != number and number.isdecimal() and shard_name(int(number)) == name


@dataclass(frozen=True)
class DimensionRange:
    """The sizes that a free dimension may take, all inclusive.

    Attributes:
        minimum: smallest size.
        optimum: the size that an engine is tuned for.
        maximum: largest size.
        multiple: every size must be divisible by it.
    """

    minimum: int
    optimum: int
    maximum: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"dimension range {self} is not ordered minimum <= optimum <= maximum")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: the engine's own name for it (optimum's names).
        dtype: NumPy's name of the element type, e.g. "float32" or "int64".
        shape: sizes; a string is a free dimension such as "B", whose range the component gives.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ComponentSpec:
    """The interface of one network.

    Attributes:
        name: one of ``COMPONENTS`` or ``HOISTED``, ``SHALLOW``, or a `shard_name`.
        inputs: in the order of the graph; likewise ``outputs``.
        dimensions: the range of every free dimension that occurs in a shape.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: Mapping[str, DimensionRange]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {
            "name": self.name,
            "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.inputs],
            "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.outputs],
            "dimensions": {
                symbol: [size.minimum, size.optimum, size.maximum, size.multiple]
                for symbol, size in self.dimensions.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ComponentSpec:
        """Read what `to_json` wrote."""

        def tensors(rows: list[Any]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in rows)

        return cls(
            name=value["name"],
            inputs=tensors(value["inputs"]),
            outputs=tensors(value["outputs"]),
            dimensions={symbol: DimensionRange(*sizes) for symbol, sizes in value["dimensions"].items()},
        )
