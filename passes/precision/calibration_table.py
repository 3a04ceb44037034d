"""The ranges that static quantisation needs, with where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.graph_digest import digest_from_model

_SCHEMA = 1


@dataclass(frozen=True)
class CalibrationTable:
    """Absolute ranges of the activations of one graph, over real denoising runs.

    Attributes:
        graph_digest: `digest_from_model` of the graph that the tensors belong to.
        method: how ``ranges`` follow from what was seen; "max" is the largest magnitude over all timesteps.
        prompts: what was denoised, each from its own noise; the empty prompt of guidance is not listed.
        seed: noise of the first prompt; the others count up from it.
        sampler: "ddim".
        steps: denoising steps of each run.
        guidance_scale: weight of classifier-free guidance; above 1 the empty prompt runs along.
        latent_size: height and width of the latents.
        timesteps: what the network was called with, in the order of a run.
        maxima: for each tensor (by name), the largest magnitude at each of ``timesteps``.
        ranges: for each tensor, the magnitude that maps to the largest integer; larger values saturate.
    """

    graph_digest: str
    method: str
    prompts: tuple[str, ...]
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    latent_size: tuple[int, int]
    timesteps: tuple[float, ...]
    maxima: Mapping[str, tuple[float, ...]]
    ranges: Mapping[str, float]

    def check_graph(self, model: ir.Model) -> None:
        """Pass only for the graph that was calibrated.

        Raises:
            PassError: `model` is another graph, or has other weights.
        """
        digest = digest_from_model(model)
        if digest != self.graph_digest:
            raise PassError(
                f"the calibration table belongs to the graph {self.graph_digest[:12]}, this graph is {digest[:12]}",
                hint="calibrate this graph: ranges hold only for the weights and passes that they were measured with",
            )

    def range_of(self, tensor: str) -> float:
        """Range of a tensor by name.

        Raises:
            PassError: the tensor was not calibrated.
        """
        if tensor not in self.ranges:
            raise PassError(
                f"the calibration table has no range for tensor {tensor!r} (it has {len(self.ranges)} others)",
                hint="calibrate again with this version of sdc",
            )
        return self.ranges[tensor]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {
            "schema": _SCHEMA,
            "graph_digest": self.graph_digest,
            "method": self.method,
            "prompts": list(self.prompts),
            "seed": self.seed,
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "latent_size": list(self.latent_size),
            "timesteps": list(self.timesteps),
            "maxima": {name: list(values) for name, values in self.maxima.items()},
            "ranges": dict(self.ranges),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CalibrationTable:
        """Read what `to_json` wrote.

        Raises:
            InputError: the schema is another one, or an entry is missing or malformed.
        """
        if value.get("schema") != _SCHEMA:
            raise InputError(
                f"calibration table of schema {value.get('schema')!r}, expected {_SCHEMA}", hint="calibrate again"
            )
        try:
            height, width = value["latent_size"]
            table = cls(
                graph_digest=str(value["graph_digest"]),
                method=str(value["method"]),
                prompts=tuple(value["prompts"]),
                seed=int(value["seed"]),
                sampler=str(value["sampler"]),
                steps=int(value["steps"]),
                guidance_scale=float(value["guidance_scale"]),
                latent_size=(int(height), int(width)),
                timesteps=tuple(float(timestep) for timestep in value["timesteps"]),
                maxima={name: tuple(map(float, row)) for name, row in value["maxima"].items()},
                ranges={name: float(limit) for name, limit in value["ranges"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"malformed calibration table: {error!r}", hint="calibrate again") from error
        if any(len(row) != len(table.timesteps) for row in table.maxima.values()):
            raise InputError(
                "malformed calibration table: maxima and timesteps differ in length", hint="calibrate again"
            )
        return table
