"""From what was asked for to the plan of one component, and from the plan to passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sdc.compiler.component import Component
from sdc.compiler.precision.budget import QualityBudget
from sdc.engines.errors import InputError
from sdc.passes.base import Pass
from sdc.passes.pipeline import MIXED, PRECISIONS, precision_passes
from sdc.passes.precision.formats import CALIBRATED, FLOATING, Format
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan

AUTO = "auto"
"""The name of what is chosen by measurement."""


@dataclass(frozen=True)
class PrecisionRequest:
    """What the user asks for.

    Attributes:
        name: one of `PRECISIONS`, `MIXED`, or `AUTO`.
        plan: with `MIXED`, and with `AUTO` once it is chosen: of the UNet's layers, with the type of everything else.
        budget: with `AUTO`: how far pictures may be from those in float32.
    """

    name: str
    plan: PrecisionPlan | None = None
    budget: QualityBudget | None = None

    def __post_init__(self) -> None:
        if self.name not in (*PRECISIONS, MIXED, AUTO):
            raise InputError(
                f"unknown precision {self.name!r}",
                hint=f"choose one of {', '.join(PRECISIONS)}, {AUTO}, or give a plan: a file whose name ends in .toml",
            )
        if self.name != AUTO and (self.name == MIXED) != (self.plan is not None):
            raise InputError(f"precision {self.name!r} and a plan do not go together", hint="give one of them")

        if (self.name == AUTO) != (self.budget is not None):
            raise InputError(
                f"precision {self.name!r} {'needs' if self.name == AUTO else 'takes no'} --quality-budget",
                hint="for example --precision auto --quality-budget 35dB",
            )

    @property
    def default(self) -> Format:
        """For everything that is no layer of the UNet."""
        if self.plan is not None:
            return self.plan.default
        return Format(self.name) if self.name in FLOATING else Format.FP16

    def formats(self) -> frozenset[Format]:
        """All that occur, as far as is known before the graph."""
        # Before it is chosen, an automatic plan may hold what it chooses from.
        single = Format.INT8 if self.name == AUTO else self.name
        layers = frozenset({Format(single)}) if self.plan is None else self.plan.formats()
        return layers | {self.default}

    @property
    def calibrates(self) -> bool:
        """Whether activations are quantised."""
        return bool(self.formats() & CALIBRATED)


def plan_for(component: Component, precision: str, plan: PrecisionPlan | None) -> PrecisionPlan:
    """The plan given, checked, or the one that a single precision stands for.

    Raises:
        InputError: the plan is another graph's.
    """
    if plan is not None:
        plan.check_graph(component.model)
        return plan
    sizes = {symbol: size.optimum for symbol, size in component.spec.dimensions.items()}
    return uniform_plan(component.model, Format(precision), sizes=sizes)


def passes_from_plan(
    plan: PrecisionPlan,
    quantise: tuple[Pass, ...],
    *,
    correct: tuple[Pass, ...] = (),
    float32: frozenset[str] = frozenset(),
    backend: str | None = None,
) -> tuple[Pass, ...]:
    """The precision phase of a component whose layers are planned.

    Args:
        plan: of the layers.
        quantise: what puts the plan's integers into the graph; empty for a plan of floats.
        correct: as in `precision_passes`; likewise `backend`.
        float32: nodes that stay so, whatever the plan.
    """
    half, exceptions = plan.float_exceptions()
    passes = partial(precision_passes, MIXED, quantise=quantise, correct=correct, remainder=half, backend=backend)
    if plan.default is Format.FP32:
        return passes(only=exceptions - float32)
    return passes(float32=exceptions | float32)
