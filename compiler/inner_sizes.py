"""Sizes inside of a network as an interface can have them: numbers, symbols, and whole fractions of symbols."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from sdc.engines.specs import ComponentSpec, DimensionRange


class InnerSizes:
    """Names for sizes of tensors that cross between engines; those like ``H/2`` get a range.

    Args:
        spec: the network's interface.

    Attributes:
        dimensions: those of the interface, and of all names that were found so far.
    """

    def __init__(self, spec: ComponentSpec) -> None:
        self._spec = spec
        self.dimensions: dict[str, DimensionRange] = dict(spec.dimensions)

    def name(self, size: int | ir.SymbolicDim) -> int | str | None:
        """A number, a symbol, or ``H/2``; None for another expression, or where that is not whole for every H."""
        if isinstance(size, int):
            return size
        if size.value is None:
            return None
        if size.value in self.dimensions:
            return str(size.value)
        for symbol, whole in self._spec.dimensions.items():
            if size.free_symbols() != {symbol}:
                continue
            factor = whole.optimum // max(1, _at(size, symbol, whole.optimum))
            if factor > 1 and all(_at(size, symbol, each) * factor == each for each in _sizes_in(whole)):
                name = f"{symbol}/{factor}"
                self.dimensions[name] = DimensionRange(
                    whole.minimum // factor,
                    whole.optimum // factor,
                    whole.maximum // factor,
                    max(1, whole.multiple // factor),
                )
                return name
        return None

    def name_shape(self, shape: ir.Shape) -> ir.Shape | None:
        """A shape with these names; None if one of its sizes has none."""
        names = [self.name(size) for size in shape]
        return None if None in names else ir.Shape(names)

    def known(self) -> ComponentSpec:
        """The network's interface with all names that were found."""
        return replace(self._spec, dimensions=dict(self.dimensions))


def _sizes_in(allowed: DimensionRange) -> range:
    return range(allowed.minimum, allowed.maximum + 1, allowed.multiple)


def _at(size: ir.SymbolicDim, symbol: str, value: int) -> int:
    found = size.evaluate({symbol: value})
    assert isinstance(found, int)
    return found
