"""A UNet and the shallow one of DeepCache: the graphs that `split_deep` gives, with their interfaces."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component, interface_of
from sdc.compiler.inner_sizes import InnerSizes
from sdc.engines.errors import ExportError
from sdc.engines.specs import SHALLOW, ComponentSpec
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
    inner = InnerSizes(unet.spec)
    shape = ir.Shape([_named(size, inner, unet.spec) for size in cached.taken.shape or ()])
    cached.full.shape = cached.taken.shape = shape
    known = inner.known()
    sizes = {symbol: size.optimum for symbol, size in unet.spec.dimensions.items()}
    details = {
        "depth": depth,
        "shallow_macs": count_macs(cached.shallow, sizes).total,
        "full_macs": count_macs(unet.model, sizes).total,
    }
    full = Component(interface_of(unet.spec.name, unet.model.graph, known), unet.model)
    shallow = Component(interface_of(SHALLOW, cached.shallow.graph, known), cached.shallow)
    return (full, shallow), replace(cached.report, details=details)


def _named(size: int | ir.SymbolicDim, inner: InnerSizes, spec: ComponentSpec) -> int | str:
    """A size of the deep features as an interface can have it."""
    name = inner.name(size)
    if name is None:
        raise ExportError(
            f"DeepCache: the deep features would have the size {size}, which is no whole fraction of one of "
            f"{', '.join(spec.dimensions)}",
            hint="choose a smaller depth",
        )
    return name
