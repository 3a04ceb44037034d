"""A UNet and the shallow one of DeepCache: the graphs that `split_deep` gives, with their interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component, interface_of
from sdc.engines.errors import ExportError
from sdc.engines.specs import SHALLOW, ComponentSpec, DimensionRange
from sdc.passes.base import PassReport
from sdc.passes.hoisting.deepcache import split_deep
from sdc.passes.macs import count_macs


def divide_unet(
    unet: Component, *, hoist: bool, deepcache: int | None
) -> tuple[tuple[Component, ...], dict[str, PassReport]]:
    """The engines that a UNet, or another component, is made of, itself first. Its graph is changed in place.

    Args:
        unet: in its precision, before it is lowered.
        hoist: whether what does not change between steps leaves it.
        deepcache: depth of the skip connection at which the shallow UNet is cut; None for no such engine.

    Returns:
        The components; and the reports by the names of their phases.

    Raises:
        ExportError: a tensor that would cross has a free dimension whose sizes are unknown.
        InputError: the UNet has no skip connection of this depth.
        PassError: the UNet has none at all, or cannot be cut there.
    """
    components: tuple[Component, ...] = (unet,)
    reports = {}
    if hoist:
        components, reports["hoisting"] = hoist_component(unet)
    if deepcache is not None:
        (full, shallow), reports["deepcache"] = cache_component(components[0], deepcache)
        components = (full, shallow, *components[1:])
    return components, reports


def cache_component(unet: Component, depth: int) -> tuple[tuple[Component, Component], PassReport]:
    """Split a UNet for DeepCache; its graph is changed in place.

    Returns:
        The UNet, which gives its deep features too; the shallow UNet, which takes them. And the report, with the
        multiply-adds of both, at the sizes that the UNet is tuned for.

    Raises:
        ExportError: the sizes of the deep features are no whole fraction of the UNet's.
        InputError: the UNet has no skip connection of this depth.
        PassError: it has none at all, or cannot be cut there.
    """
    cached = split_deep(unet.model, depth)
    dimensions = dict(unet.spec.dimensions)
    shape = ir.Shape([_size(size, unet.spec, dimensions) for size in cached.taken.shape or ()])
    cached.full.shape = cached.taken.shape = shape
    known = replace(unet.spec, dimensions=dimensions)
    sizes = {symbol: size.optimum for symbol, size in unet.spec.dimensions.items()}
    details = {
        "depth": depth,
        "shallow_macs": count_macs(cached.shallow, sizes).total,
        "full_macs": count_macs(unet.model, sizes).total,
    }
    full = Component(interface_of(unet.spec.name, unet.model.graph, known), unet.model)
    shallow = Component(interface_of(SHALLOW, cached.shallow.graph, known), cached.shallow)
    return (full, shallow), replace(cached.report, details=details)


def _size(size: int | ir.SymbolicDim, spec: ComponentSpec, dimensions: dict[str, DimensionRange]) -> int | str:
    """A size of the deep features as an interface can have it: a number, a symbol, or ``H/2``, which is added."""
    if isinstance(size, int) or size.value in dimensions:
        return size if isinstance(size, int) else str(size.value)
    for symbol, whole in spec.dimensions.items():
        if size.free_symbols() != {symbol}:
            continue
        factor = whole.optimum // max(1, _at(size, symbol, whole.optimum))
        if factor > 1 and all(_at(size, symbol, each) * factor == each for each in _sizes_in(whole)):
            name = f"{symbol}/{factor}"
            dimensions[name] = DimensionRange(
                whole.minimum // factor,
                whole.optimum // factor,
                whole.maximum // factor,
                max(1, whole.multiple // factor),
            )
            return name
    raise ExportError(
        f"DeepCache: the deep features would have the size {size.value}, which is no whole fraction of one of "
        f"{', '.join(spec.dimensions)}",
        hint="choose a smaller depth",
    )


def _sizes_in(allowed: DimensionRange) -> range:
    return range(allowed.minimum, allowed.maximum + 1, allowed.multiple)


def _at(size: ir.SymbolicDim, symbol: str, value: int) -> int:
    bindings: Mapping[str, int] = {symbol: value}
    found = size.evaluate(bindings)
    assert isinstance(found, int)
    return found
