"""What each layer costs in floating point and in its planned format: measured where the target runs, else modelled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

from sdc.passes.precision.formats import Format
from sdc.passes.precision.plan import PrecisionPlan

GPU_RATES = {Format.FP32: 1.0, Format.FP16: 4.0, Format.BF16: 4.0, Format.INT8: 8.0, Format.FP8: 8.0}
"""Multiply-adds a second relative to float32, assumed: neither measured nor taken from a document."""


@dataclass(frozen=True)
class LayerCost:
    """Time of one layer, in any unit.

    Attributes:
        floating: in the plan's default precision.
        planned: in the format that the plan has for it.
    """

    floating: float
    planned: float

    @property
    def saved(self) -> float:
        """By the planned format; negative where it is slower."""
        return self.floating - self.planned

    def __add__(self, other: Self) -> LayerCost:
        return LayerCost(self.floating + other.floating, self.planned + other.planned)


@dataclass(frozen=True)
class LayerCosts:
    """Of all layers of a plan.

    Attributes:
        layers: by name.
        describe: a cost as the plan's reasons have it.
    """

    layers: Mapping[str, LayerCost]
    describe: Callable[[LayerCost], str]

    def scaled(self, names: Collection[str], factor: float) -> LayerCosts:
        """The same, where some layers run more or less often than the others."""
        scaled = {
            name: LayerCost(factor * cost.floating, factor * cost.planned) if name in names else cost
            for name, cost in self.layers.items()
        }
        return replace(self, layers=scaled)

    def share(self, plan: PrecisionPlan) -> float:
        """Time of a plan's layers as a part of what they take in its default precision."""
        found = [(self.layers[layer.name], layer.format is plan.default) for layer in plan.layers]
        taken = sum(cost.floating if floating else cost.planned for cost, floating in found)
        return taken / sum(cost.floating for cost, _ in found)


def modelled_costs(plan: PrecisionPlan) -> LayerCosts:
    """Multiply-adds by `GPU_RATES`; a format that is not among them costs what the default does."""
    usual = GPU_RATES[plan.default]
    costs = {
        layer.name: LayerCost(layer.macs / usual, layer.macs / GPU_RATES.get(layer.format, usual))
        for layer in plan.layers
    }
    return LayerCosts(costs, lambda cost: f"{cost.planned / cost.floating:.2f} of its time, assumed")


def describe_seconds(cost: LayerCost) -> str:
    """Of costs in seconds."""
    return f"{1e6 * cost.planned:.3g} µs a step instead of {1e6 * cost.floating:.3g}"
