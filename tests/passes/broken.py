"""Broken passes: ways to go wrong, and the check that the proof of every pass notices them.

A pass is broken from inside, by exchanging a function that it calls (`patched`), or its result is edited as if it had
written something else (`nodes`, `swapped`, …). Either way it has to fail the proof that it passes unbroken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import onnx.shape_inference
import onnx_ir as ir
import pytest
from equality import FP32, Feeds, apply_proven

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport

NOTICED = (AssertionError, onnx.shape_inference.InferenceError)
"""Another result; or shapes that contradict those of the graph, which the proof has ONNX check before it runs it."""

Change = Callable[[ir.Model], None]
Proof = Callable[..., Sequence[PassReport]]


@dataclass(frozen=True)
class Broken:
    """How a pass is broken.

    Attributes:
        patch: active while the pass runs.
        change: made to its result.
    """

    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    change: Change = lambda _: None


@dataclass(frozen=True)
class Case:
    """A pass, a graph that it rewrites, and what can go wrong.

    Attributes:
        make: the graph before.
        feeds: among them some by which each of the errors shows.
        passes: all that run; the first that is of the type of `broken_pass` is the one that breaks.
        kinds: the ways to break it, by name.
        broken_pass: None if there is only one pass.
        tolerance: of the proof; an error has to exceed it ten times.
        prove: `apply_proven` or what takes the same arguments.
    """

    make: Callable[[], ir.Model]
    feeds: Sequence[Feeds]
    passes: Sequence[Pass]
    kinds: Mapping[str, Broken]
    broken_pass: type[Pass] | None = None
    tolerance: float = FP32
    prove: Proof = apply_proven

    @property
    def index(self) -> int:
        """Place of the pass that breaks."""
        wanted = self.broken_pass or type(self.passes[0])
        return next(index for index, each in enumerate(self.passes) if isinstance(each, wanted))


@dataclass(frozen=True)
class _BrokenPass(Pass):
    inner: Pass
    broken: Broken = field(default_factory=Broken)
    name: ClassVar[str] = "broken"

    def rewrite(self, model: ir.Model) -> PassReport:
        with self.broken.patch():
            report = self.inner.run(model)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.LazyTensor):  # written later, but by what is broken now
                    value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        self.broken.change(model)
        return report


def check_noticed(case: Case, kind: str) -> None:
    """Fail unless the unbroken pass rewrites the graph and proves itself, and the broken one does not."""
    reports = case.prove(case.passes, case.make(), case.feeds, tolerance=case.tolerance)
    assert reports[case.index].matched >= 1, "the pass has nothing to do here"
    broken = list(case.passes)
    broken[case.index] = _BrokenPass(broken[case.index], case.kinds[kind])
    with pytest.raises(NOTICED, match=r"not equal|Inferred shape"):
        case.prove(broken, case.make(), case.feeds, tolerance=10 * case.tolerance)


def names(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """Parameters of a test over all cases."""
    return [(name, kind) for name, case in cases.items() for kind in case.kinds]


def patched(target: str, exchange: Callable[[Any], Any]) -> Broken:
    """``module:attribute`` of `sdc.passes` is exchanged for what `exchange` makes of it, while the pass runs."""
    path, _, attribute = target.partition(":")
    module = importlib.import_module(f"sdc.passes.{path}")
    return Broken(patch=partial(mock.patch.object, module, attribute, exchange(getattr(module, attribute))))


def entry(target: str, key: str, value: Any) -> Broken:
    """An entry of a dictionary is another one, while the pass runs."""
    path, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(f"sdc.passes.{path}"), attribute)
    return Broken(patch=partial(mock.patch.dict, found, {key: value}))


def nodes(op_type: str, change: Callable[[ir.Node], None]) -> Broken:
    """All nodes of a kind are changed."""

    def apply(model: ir.Model) -> None:
        found = [node for node in model.graph if node.op_type == op_type]
        assert found, f"no {op_type} in the result"
        for node in found:
            change(node)

    return Broken(change=apply)


def attribute(op_type: str, name: str, value: Any) -> Broken:
    """An attribute is lost (None) or wrong."""

    def change(node: ir.Node) -> None:
        if value is None:
            del node.attributes[name]
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return nodes(op_type, change)


def swapped(op_type: str, first: int, second: int) -> Broken:
    """Two operands change places."""

    def change(node: ir.Node) -> None:
        one, other = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, other)
        node.replace_input_with(second, one)

    return nodes(op_type, change)


def operand(op_type: str, index: int, source: int) -> Broken:
    """An operand is taken twice, another forgotten."""
    return nodes(op_type, lambda node: node.replace_input_with(index, node.inputs[source]))


def without_operand(op_type: str, index: int) -> Broken:
    """The last operand, at `index`, is forgotten."""
    return nodes(op_type, lambda node: node.resize_inputs(index))


def renamed(op_type: str, other: str, *, fused: bool = False) -> Broken:
    """Another operator stands there, a standard one or a fused one."""

    def apply(model: ir.Model) -> None:
        if fused:
            domain.import_operator(model, other)
        for node in [node for node in model.graph if node.op_type == op_type]:
            node.op_type, node.domain = other, domain.DOMAIN if fused else ""

    return Broken(change=apply)


def initializers(matching: Callable[[ir.Value], bool], change: Callable[[np.ndarray], np.ndarray]) -> Broken:
    """Constants are changed."""

    def apply(model: ir.Model) -> None:
        found = [value for value in model.graph.initializers.values() if matching(value)]
        assert found, "no such initialiser in the result"
        for value in found:
            assert value.const_value is not None
            array = value.const_value.numpy()
            value.const_value = ir.tensor(change(array).astype(array.dtype), name=value.name)

    return Broken(change=apply)


def operand_values(op_type: str, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Broken:
    """A constant operand of all nodes of a kind is changed."""

    def apply(model: ir.Model) -> None:
        found = {node.inputs[index] for node in model.graph if node.op_type == op_type}
        initializers(lambda value: value in found, change).change(model)

    return Broken(change=apply)
