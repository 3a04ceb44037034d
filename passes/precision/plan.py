"""Which precision each layer of a graph has, and why; written out, edited and passed back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from sdc.engines.errors import InputError
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.macs import count_macs
from sdc.passes.precision.formats import BLOCK_SIZES, FLOATING, Format
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.quantisation import (
    DEFAULT_KEPT,
    DEFAULT_WEIGHTS_ONLY,
    REASONS,
    Layer,
    find_layers,
    row_length,
)

W4_SENSITIVE = frozenset({Role.TIMESTEP, Role.INPUT, Role.OUTPUT, Role.SHORTCUT, Role.PROJECTION_OUT})
"""Roles whose weights have eight bits where the others have four."""


@dataclass(frozen=True)
class PlannedLayer:
    """One line of a plan.

    Attributes:
        name: of the layer's output in the fused graph.
        role: its place in the network.
        shape: of its weight.
        macs: multiply-adds at the sizes that the network is tuned for; 0 where no sizes were given.
        format: its precision.
        reason: why.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    macs: int
    format: Format
    reason: str


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of every layer of one graph.

    Attributes:
        graph_digest: `digest_from_model` of the fused graph.
        default: "fp32", "fp16" or "bf16": for everything that is no layer.
        block_size: weights that share a scale in "w4".
        layers: all of them, in the order of the graph.
    """

    graph_digest: str
    default: Format
    block_size: int
    layers: tuple[PlannedLayer, ...]

    def __post_init__(self) -> None:
        if self.default not in FLOATING:
            raise InputError(
                f"the default of a plan is {self.default.value!r}", hint=f"choose {', '.join(sorted(FLOATING))}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"w4 in blocks of {self.block_size}", hint=f"choose one of {BLOCK_SIZES}")
        halves = self.formats() & (FLOATING - {Format.FP32})
        if len(halves | ({self.default} - {Format.FP32})) > 1:
            raise InputError(
                "a plan mixes fp16 and bf16, in its layers or its default", hint="keep to one of them, besides fp32"
            )

    def formats(self) -> frozenset[Format]:
        """Those that occur in layers."""
        return frozenset(layer.format for layer in self.layers)

    def by_name(self) -> dict[str, PlannedLayer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    def check_graph(self, model: ir.Model) -> None:
        """Pass only for the graph that the plan was made for.

        Raises:
            InputError: `model` is another graph, or has other weights.
        """
        digest = digest_from_model(model)
        if digest != self.graph_digest:
            raise InputError(
                f"the precision plan belongs to the graph {self.graph_digest[:12]}, this graph is {digest[:12]}",
                hint="export once with --precision int8 and edit the plan in that bundle: layers are known by the "
                "weights and passes that they come from",
            )

    def with_default(self, default: Format) -> PrecisionPlan:
        """The same with another floating-point type; layers in float32 stay so."""
        layers = tuple(
            replace(layer, format=default) if layer.format in FLOATING - {Format.FP32} else layer
            for layer in self.layers
        )
        return replace(self, default=default, layers=layers)

    def float_exceptions(self) -> tuple[Format, frozenset[str]]:
        """The type that the graph is cast to, and the names of the layers that it does not hold for."""
        exceptions = {layer.name: layer.format for layer in self.layers if layer.format in FLOATING - {self.default}}
        half = next(iter(set(exceptions.values()) - {Format.FP32}), self.default)
        return half, frozenset(exceptions)


def uniform_plan(
    model: ir.Model,
    precision: Format,
    *,
    default: Format = Format.FP16,
    block_size: int = BLOCK_SIZES[0],
    sizes: Mapping[str, int] | None = None,
    kept: frozenset[Role] = DEFAULT_KEPT,
) -> PrecisionPlan:
    """The plan that a single precision stands for; what it leaves alone is chosen by roles.

    1. A floating-point precision holds for the whole graph.
    2. "int8" and "fp8" hold for the layers whose role is not in `kept`; of those kept, `DEFAULT_WEIGHTS_ONLY` store
       their weights in eight bits and the others stay in `default`.
    3. "w8" holds for all layers; "w4" for those whose role is not in `W4_SENSITIVE` and whose rows divide into blocks,
       and the others are "w8".

    Args:
        model: the fused graph.
        precision: of the layers.
        default: of everything else, where the precision is not a floating-point one.
        block_size: for "w4".
        sizes: of the symbols in the graph's inputs, to count multiply-adds.
        kept: roles that "int8" and "fp8" leave alone.
    """
    layers, _ = find_layers(model)
    macs = {each.site: each.macs for each in count_macs(model, sizes).products} if sizes else {}
    default = precision if precision in FLOATING else default

    def planned(layer: Layer) -> PlannedLayer:
        name = layer.node.outputs[0].name or ""
        chosen, reason = _choose(layer, precision, default, block_size, kept)
        return PlannedLayer(name, layer.role, layer.weight_shape, macs.get(name, 0), chosen, reason)

    return PrecisionPlan(digest_from_model(model), default, block_size, tuple(map(planned, layers)))


def _choose(
    layer: Layer, precision: Format, default: Format, block_size: int, kept: frozenset[Role]
) -> tuple[Format, str]:
    if precision in FLOATING or precision is Format.W8:
        return precision, "asked for"
    if precision is Format.W4:
        return _choose_four_bits(layer, block_size)
    if layer.role not in kept:
        return precision, "asked for"
    return (Format.W8 if layer.role in DEFAULT_WEIGHTS_ONLY else default), REASONS[layer.role]


def _choose_four_bits(layer: Layer, block_size: int) -> tuple[Format, str]:
    if layer.role in W4_SENSITIVE:
        return Format.W8, REASONS[layer.role]
    if row_length(layer) % block_size:
        return Format.W8, f"{row_length(layer)} weights to a row do not divide into blocks of {block_size}"
    return Format.W4, "asked for"
