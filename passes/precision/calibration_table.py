"""What static quantisation needs to know of a graph's activations, with where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibrators import range_from_histogram
from sdc.passes.precision.packed_arrays import pack, unpack
from sdc.passes.precision.range_rules import Range, RangeRule
from sdc.passes.precision.smoothing_rule import SmoothingRule
from sdc.passes.precision.tensor_statistics import ChannelRanges, TensorStatistics

_SCHEMA = 3


@dataclass(frozen=True)
class Smoothing:
    """What a graph was smoothed with before its activations were measured.

    Attributes:
        graph_digest: of the graph before.
        rule: what moves from activations to weights.
        magnitudes: largest magnitude of each channel of each tensor of that graph, by the tensor's name.
        factors: what the channels of tensors were divided by, by the tensor's name; tensors that were left alone have
            none. What was measured holds for these factors alone, so they are used again where the weights are others.
            None: they follow from the rule.
    """

    graph_digest: str
    rule: SmoothingRule
    magnitudes: Mapping[str, tuple[float, ...]]
    factors: Mapping[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class CalibrationTable:
    """Statistics of the activations of one graph, over real denoising runs.

    Attributes:
        graph_digest: `digest_from_model` of the graph that the tensors belong to.
        prompts: what was denoised, each from its own noise; the empty prompt of guidance is not listed.
        seed: noise of the first prompt; the others count up from it.
        sampler: "ddim".
        steps: denoising steps of each run.
        guidance_scale: weight of classifier-free guidance; above 1 the empty prompt runs along.
        latent_size: height and width of the latents.
        timesteps: what the network was called with, in the order of a run.
        tensors: statistics by the tensor's name.
        smoothing: how to get to that graph from the fused one; None if it is that.
        ranges: by `RangeRule.label` and tensor, ranges that are used as they are; others follow from the statistics.
        results: of convolutions, by the tensor's name; tables of earlier versions have none.
    """

    graph_digest: str
    prompts: tuple[str, ...]
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    latent_size: tuple[int, int]
    timesteps: tuple[float, ...]
    tensors: Mapping[str, TensorStatistics]
    smoothing: Smoothing | None = None
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)
    results: Mapping[str, ChannelRanges] = field(default_factory=dict)

    @property
    def source_digest(self) -> str:
        """Of the graph that was calibrated, before it was smoothed."""
        return self.graph_digest if self.smoothing is None else self.smoothing.graph_digest

    def check_graph(self, model: ir.Model) -> None:
        """Pass only for the graph that was calibrated.

        Raises:
            PassError: `model` is another graph, or has other weights.
        """
        check_digest(model, self.graph_digest)

    def range_of(self, tensor: str, rule: RangeRule) -> Range:
        """Range of a tensor by name.

        Raises:
            PassError: the tensor was not calibrated, or its values are not finite.
        """
        stored = self.ranges.get(rule.label, {}).get(tensor)
        found = stored if stored is not None else self._derive(tensor, rule)
        if not (np.isfinite(found).all() and found.low <= 0 <= found.high):
            raise PassError(
                f"the range of tensor {tensor!r} is {found.low} to {found.high}, expected finite numbers around 0",
                hint="calibrate again",
            )
        return found

    def _derive(self, tensor: str, rule: RangeRule) -> Range:
        seen = self.statistics_of(tensor).seen
        return range_from_histogram(self.tensors[tensor].histogram, seen, rule) if np.isfinite(seen).all() else seen

    def statistics_of(self, tensor: str) -> TensorStatistics:
        """Statistics of a tensor by name.

        Raises:
            PassError: the tensor was not calibrated.
        """
        if tensor not in self.tensors:
            raise PassError(
                f"the calibration table has no range for tensor {tensor!r} (it has {len(self.tensors)} others)",
                hint="calibrate again with this version of sdc",
            )
        return self.tensors[tensor]

    def with_ranges(self, rules: Iterable[RangeRule]) -> CalibrationTable:
        """The same table with the ranges of these rules written down."""
        found = {rule.label: {name: self.range_of(name, rule) for name in self.tensors} for rule in rules}
        return replace(self, ranges={**self.ranges, **found})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {
            "schema": _SCHEMA,
            "graph_digest": self.graph_digest,
            "prompts": list(self.prompts),
            "seed": self.seed,
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "latent_size": list(self.latent_size),
            "timesteps": list(self.timesteps),
            "ranges": {
                rule: {name: [each.low, each.high] for name, each in rows.items()} for rule, rows in self.ranges.items()
            },
            "smoothing": None if self.smoothing is None else _json_from_smoothing(self.smoothing),
            "tensors": {name: each.to_json() for name, each in self.tensors.items()},
            "results": {name: each.to_json() for name, each in self.results.items()},
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
            table = _table_from_json(value)
        except KeyError as error:
            raise InputError(f"malformed calibration table: {error} is missing", hint="calibrate again") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"malformed calibration table: {error!r}", hint="calibrate again") from error
        if any(
            len(row) != len(table.timesteps) for each in table.tensors.values() for row in (each.minima, each.maxima)
        ):
            raise InputError(
                "malformed calibration table: maxima and timesteps differ in length", hint="calibrate again"
            )
        return table


def check_digest(model: ir.Model, expected: str) -> None:
    """Pass only for the graph of a digest.

    Raises:
        PassError: `model` is another graph, or has other weights.
    """
    digest = digest_from_model(model)
    if digest != expected:
        raise PassError(
            f"the calibration table belongs to the graph {expected[:12]}, this graph is {digest[:12]}",
            hint="calibrate this graph: ranges hold only for the weights and passes that they were measured with",
        )


def _table_from_json(value: Mapping[str, Any]) -> CalibrationTable:
    height, width = value["latent_size"]
    smoothing = value["smoothing"]
    return CalibrationTable(
        graph_digest=str(value["graph_digest"]),
        prompts=tuple(value["prompts"]),
        seed=int(value["seed"]),
        sampler=str(value["sampler"]),
        steps=int(value["steps"]),
        guidance_scale=float(value["guidance_scale"]),
        latent_size=(int(height), int(width)),
        timesteps=tuple(float(timestep) for timestep in value["timesteps"]),
        tensors={name: TensorStatistics.from_json(each) for name, each in value["tensors"].items()},
        results={name: ChannelRanges.from_json(each) for name, each in value.get("results", {}).items()},
        smoothing=None if smoothing is None else _smoothing_from_json(smoothing),
        ranges={
            rule: {name: Range(float(low), float(high)) for name, (low, high) in rows.items()}
            for rule, rows in value["ranges"].items()
        },
    )


def _json_from_smoothing(smoothing: Smoothing) -> dict[str, Any]:
    return {
        "graph_digest": smoothing.graph_digest,
        "alpha": smoothing.rule.alpha,
        "outlier_ratio": smoothing.rule.outlier_ratio,
        "magnitudes": {name: pack(np.array(row, np.float32)) for name, row in smoothing.magnitudes.items()},
        "factors": None
        if smoothing.factors is None
        else {name: pack(np.array(row, np.float64)) for name, row in smoothing.factors.items()},
    }


def _smoothing_from_json(value: Mapping[str, Any]) -> Smoothing:
    factors = value.get("factors")
    return Smoothing(
        graph_digest=str(value["graph_digest"]),
        rule=SmoothingRule(float(value["alpha"]), float(value["outlier_ratio"])),
        magnitudes={name: tuple(unpack(row).tolist()) for name, row in value["magnitudes"].items()},
        factors=None if factors is None else {name: tuple(unpack(row).tolist()) for name, row in factors.items()},
    )
