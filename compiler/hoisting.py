"""A UNet and the engines beside it: the graphs that `hoist` gives, with their interfaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir

from sdc.compiler.component import Component
from sdc.engines.errors import ExportError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.passes.base import PassReport
from sdc.passes.hoisting.hoist import PROMPT, TIMESTEP, hoist
from sdc.passes.macs import count_macs

COMPONENT_OF_PART = {PROMPT: "unet_prompt", TIMESTEP: "unet_timestep"}


def hoist_component(unet: Component) -> tuple[tuple[Component, ...], PassReport]:
    """Take loop-invariant work out of a UNet, whose graph is changed in place.

    Returns:
        The UNet with its new interface, then what left it; the UNet alone, unchanged, if nothing can. And the report,
        with the multiply-adds that left, at the sizes that the UNet is tuned for.

    Raises:
        ExportError: a tensor that crosses has a free dimension that is none of the UNet's.
    """
    classic = unet.spec
    hoisted = hoist(unet.model)
    parts = tuple(
        Component(interface_of(COMPONENT_OF_PART[name], model.graph, classic), model)
        for name, model in hoisted.parts.items()
    )
    sizes = {symbol: size.optimum for symbol, size in classic.dimensions.items()}
    details = {
        name: {**(hoisted.report.details or {})[name], "macs": count_macs(model, sizes).total}
        for name, model in hoisted.parts.items()
    }
    rest = Component(interface_of(classic.name, unet.model.graph, classic), unet.model)
    return (rest, *parts), replace(hoisted.report, details=details or None)


def interface_of(name: str, graph: ir.Graph, classic: ComponentSpec) -> ComponentSpec:
    """The interface of a graph: tensors of the classic interface as they are there, others as the graph says.

    Raises:
        ExportError: a tensor has a free dimension that is none of the classic interface.
    """
    known = {tensor.name: tensor for tensor in (*classic.inputs, *classic.outputs)}
    inputs, outputs = (
        tuple(known.get(value.name or "") or _tensor(value, classic.dimensions) for value in values)
        for values in (graph.inputs, graph.outputs)
    )
    used = {size for tensor in (*inputs, *outputs) for size in tensor.shape}
    dimensions = {symbol: size for symbol, size in classic.dimensions.items() if symbol in used}
    return ComponentSpec(name, inputs, outputs, dimensions)


def _tensor(value: ir.Value, dimensions: Mapping[str, DimensionRange]) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    unknown = [size for size in shape if isinstance(size, str) and size not in dimensions]
    if unknown:
        raise ExportError(
            f"the tensor {value.name} would leave the UNet with the shape {list(shape)}, and nothing says how large "
            f"{', '.join(unknown)} may be",
            hint="export with --no-hoist",
        )
    return TensorSpec(value.name or "", "float32", shape)


def common_specs(specs_of_targets: Mapping[str, Iterable[ComponentSpec]]) -> dict[str, ComponentSpec]:
    """The interfaces that the engines of all targets have.

    Raises:
        ExportError: those of two targets differ.
    """
    found: dict[str, dict[str, ComponentSpec]] = {
        target: {spec.name: spec for spec in specs} for target, specs in specs_of_targets.items()
    }
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            differing = [
                name for name in {**found[first], **found[other]} if found[first].get(name) != found[other].get(name)
            ]
            raise ExportError(
                f"the engines for {first} and {other} have different interfaces: {', '.join(differing)}",
                hint="export the targets into bundles of their own, or with --no-hoist and without --shards",
            )
    return found[first]
