"""Feeds are checked against a component's interface in this one place, before any backend sees them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdc.engines.errors import InputError
from sdc.engines.specs import ComponentSpec, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Of an engine's inputs, by name."""


def shapes_of(feeds: Mapping[str, np.ndarray]) -> Shapes:
    """The shapes of feeds."""
    return {name: array.shape for name, array in feeds.items()}


class HeldFeeds:
    """Some of a component's feeds, or none, checked once for several runs.

    Args:
        spec: the component's interface.
        feeds: what stays the same in all runs.

    Attributes:
        arrays: the feeds in the order of the interface, C-contiguous (copied only if they are not).
        sizes: of the free dimensions that they have, by symbol.

    Raises:
        InputError: a feed is unknown, its element type or rank is wrong, a size is outside its range or no multiple of
            what it must be, or two feeds disagree about a free dimension.
    """

    def __init__(self, spec: ComponentSpec, feeds: Mapping[str, np.ndarray]) -> None:
        self._spec = spec
        self._others = tuple(tensor for tensor in spec.inputs if tensor.name not in feeds)
        self.sizes: dict[str, int] = {}
        held = tuple(tensor for tensor in spec.inputs if tensor.name in feeds)
        self.arrays = _check(spec, held, feeds, self.sizes)

    def complete(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The feeds that are not held, as in `arrays`, checked against those that are.

        Raises:
            InputError: as for those that are held, or a feed is missing.
        """
        return _check(self._spec, self._others, feeds, dict(self.sizes))


def _check(
    spec: ComponentSpec, tensors: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray], sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    known = {tensor.name for tensor in tensors}
    if feeds.keys() != known:
        missing, extra = sorted(known - feeds.keys()), sorted(feeds.keys() - known)
        found = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in extra]
        raise InputError(f"{spec.name} takes the inputs {', '.join(sorted(known))}: {', '.join(found)}")
    for tensor in tensors:
        _check_feed(spec, tensor, feeds[tensor.name], sizes)
    return {tensor.name: np.ascontiguousarray(feeds[tensor.name]) for tensor in tensors}


def _check_feed(spec: ComponentSpec, tensor: TensorSpec, array: np.ndarray, sizes: dict[str, int]) -> None:
    place = f"{spec.name}: {tensor.name}"
    expected = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
    if not isinstance(array, np.ndarray):
        raise InputError(f"{place}: expected an array {expected}, found {type(array).__name__}")
    if array.dtype != tensor.dtype or array.ndim != len(tensor.shape):
        raise InputError(f"{place}: expected {expected}, found {array.dtype} {list(array.shape)}")
    for axis, (size, wanted) in enumerate(zip(array.shape, tensor.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise InputError(f"{place}: axis {axis} must be {wanted}, found {size}")
            continue
        if sizes.setdefault(wanted, size) != size:
            raise InputError(f"{place}: {wanted} is {size} here and {sizes[wanted]} in an earlier input")
        allowed = spec.dimensions[wanted]
        if not allowed.minimum <= size <= allowed.maximum:
            raise InputError(
                f"{place}: {wanted} must be from {allowed.minimum} to {allowed.maximum}, found {size}",
                hint="choose another size, or export with a wider range",
            )
        if size % allowed.multiple:
            raise InputError(f"{place}: {wanted} must be a multiple of {allowed.multiple}, found {size}")
