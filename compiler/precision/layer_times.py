"""Layers timed shape by shape on the targets that run here, in graphs of their own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.precision.capabilities import in_float32
from sdc.compiler.precision.layer_costs import LayerCost, LayerCosts, describe_seconds
from sdc.compiler.precision.planning import passes_from_plan
from sdc.engines.errors import PassError
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.macs import static_shapes
from sdc.passes.pipeline import lowering_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.log_histogram import LogHistogram
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan
from sdc.passes.precision.quantisation import Layer, find_layers
from sdc.passes.precision.range_rules import MAX, RangeRule
from sdc.passes.precision.tensor_statistics import ChannelRanges, TensorStatistics

_LOWEST, _HIGHEST = -1.0, 3.0
"""Of the values that a layer is fed; any would do."""
_COPIES = 8
"""Layers in one graph: a call by itself takes as long as a small layer."""
_WARMING = 2
_ROUNDS = 5
_SECONDS = 0.03
"""Least time that a layer's rounds take together, so that short ones get more of them."""
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class _Shape:
    """What the time of a layer depends on."""

    operator: str
    attributes: str
    activation: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool


def measure_costs(
    component: Component,
    plan: PrecisionPlan,
    targets: Sequence[Target],
    *,
    rules: Mapping[str, RangeRule],
    on_layer: Callable[[int, int], None] | None = None,
) -> LayerCosts:
    """Seconds of every layer, summed over targets, at the sizes that the network is tuned for.

    Layers of equal shapes are timed once, in both formats in turn, and the shortest time counts: other work on the
    machine only ever adds. Each layer has an input of its own in float32 and its sum is float32, so what its neighbours
    would share with it (one quantised tensor for several readers) counts in full.

    Args:
        component: the fused graph in float32; it is not changed.
        plan: the formats of its layers, and the default to compare them with.
        targets: all of them run on this machine.
        rules: the kind of ranges, by name of the target.
        on_layer: progress, in distinct layers.

    Raises:
        PassError: the shape of what a layer reads does not follow from the inputs.
    """
    sizes = {symbol: size.optimum for symbol, size in component.spec.dimensions.items()}
    shapes = static_shapes(component.model, sizes)
    planned = plan.by_name()
    asked: dict[tuple[_Shape, Format], list[str]] = {}
    examples: dict[_Shape, Layer] = {}
    for layer in find_layers(component.model)[0]:
        shape = _shape_of(layer, shapes)
        examples.setdefault(shape, layer)
        name = layer.node.outputs[0].name or ""
        asked.setdefault((shape, planned[name].format), []).append(name)
    costs: dict[str, LayerCost] = {}
    for done, ((shape, wanted), names) in enumerate(asked.items(), start=1):
        cost = LayerCost(0.0, 0.0)
        for target in targets:
            default = Format.FP32 if in_float32(target) else plan.default
            cost += _time_layer(examples[shape], shape, default, wanted, target, rules[target.name])
        costs |= dict.fromkeys(names, cost)
        if on_layer is not None:
            on_layer(done, len(asked))
    return LayerCosts(costs, describe_seconds)


def _shape_of(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> _Shape:
    attributes = sorted((name, str(each.value)) for name, each in layer.node.attributes.items())
    bias = len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None
    name = layer.activation.name or ""
    if name not in shapes:
        raise PassError(
            f"no static shape for {name!r}, which {layer.node.op_type} {layer.node.outputs[0].name!r} reads"
        )
    return _Shape(layer.node.op_type, str(attributes), shapes[name], layer.weight_shape, bias)


def _time_layer(
    layer: Layer, shape: _Shape, default: Format, wanted: Format, target: Target, rule: RangeRule
) -> LayerCost:
    """In both formats, in turn; equal ones are timed once."""
    formats = (default, wanted) if wanted is not default else (default,)
    random = np.random.default_rng(0)
    feeds = {"x": random.uniform(_LOWEST, _HIGHEST, shape.activation).astype(np.float32)}
    with ExitStack() as stack:
        models = [_single(layer, shape, each, default, rule) for each in formats]
        sessions = [open_lowered(model, target, stack) for model in models]
        for session in sessions * _WARMING:
            session.run(feeds)
        seconds: list[list[float]] = [[] for _ in sessions]
        while len(seconds[0]) < _ROUNDS or (sum(map(sum, seconds)) < _SECONDS and len(seconds[0]) < _MOST_ROUNDS):
            for session, measured in zip(sessions, seconds, strict=True):
                begin = time.perf_counter()
                session.run(feeds)
                measured.append(time.perf_counter() - begin)
    return LayerCost(min(seconds[0]) / _COPIES, min(seconds[-1]) / _COPIES)


def _single(layer: Layer, shape: _Shape, wanted: Format, default: Format, rule: RangeRule) -> Component:
    """A network of this layer alone, typed."""
    model = _model_of(layer, shape)
    plan = uniform_plan(model, wanted, default=default)
    quantise: tuple[Pass, ...] = ()
    if wanted not in FLOATING:
        # Whatever the role that a layer has by itself.
        plan = replace(plan, layers=tuple(replace(line, format=wanted) for line in plan.layers))
        table = _table(model, shape.weight[layer.output_axis])
        quantise = (InsertQdq(table, plan, rule=replace(rule, method=MAX)),)
    run_passes(passes_from_plan(plan, quantise), model)
    inputs = (TensorSpec("x", "float32", shape.activation),)
    outputs = (TensorSpec("y", "float32", ("N",) * len(shape.activation)),)
    return Component(ComponentSpec("layer", inputs, outputs, {}), model)


def _model_of(layer: Layer, shape: _Shape) -> ir.Model:
    """y = the sum of copies of the layer, each with its own shift of x before it, which no optimiser moves past it."""
    random = np.random.default_rng(1)
    x = ir.Value(name="x", shape=ir.Shape(shape.activation), type=ir.TensorType(ir.DataType.FLOAT))
    constants, nodes, parts = [], [], []
    for copy in range(_COPIES):
        operands = [_constant(f"w{copy}", random.standard_normal(shape.weight, np.float32))]
        if shape.bias:
            operands.append(_constant(f"b{copy}", np.ones(shape.weight[layer.output_axis], np.float32)))
        shift = _constant(f"c{copy}", np.array(copy / 8, np.float32))
        constants += [shift, *operands]
        shifted = _float_node("Add", [x, shift], f"x{copy}")
        multiplied = _float_node(layer.node.op_type, [shifted.outputs[0], *operands], f"y{copy}", layer.node.attributes)
        nodes += [shifted, multiplied]
        parts.append(multiplied.outputs[0])
    nodes.append(_float_node("Sum", parts, "y"))
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=constants, opset_imports={"": 23}, name="layer")
    return ir.Model(graph, ir_version=10)


def _float_node(
    op_type: str,
    operands: Sequence[ir.Value],
    output: str,
    attributes: Mapping[str, ir.Attr] = MappingProxyType({}),
) -> ir.Node:
    node = ir.node(op_type, operands, dict(attributes), name=output)
    node.outputs[0].name, node.outputs[0].type = output, ir.TensorType(ir.DataType.FLOAT)
    return node


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)


def _table(model: ir.Model, channels: int) -> CalibrationTable:
    """A calibration in which x has the values that it is fed, and the layer's result so many channels."""
    seen = TensorStatistics((_LOWEST,), (_HIGHEST,), (_LOWEST,), (_HIGHEST,), (1.0,), LogHistogram())
    return CalibrationTable(
        graph_digest=digest_from_model(model),
        prompts=(),
        seed=0,
        sampler="",
        steps=1,
        guidance_scale=1.0,
        latent_size=(1, 1),
        timesteps=(0.0,),
        tensors={f"x{copy}": seen for copy in range(_COPIES)},
        results={f"y{copy}": ChannelRanges((_LOWEST,) * channels, (_HIGHEST,) * channels) for copy in range(_COPIES)},
    )


def open_lowered(component: Component, target: Target, stack: ExitStack) -> Session:
    """A typed component's engine, built in a folder that goes with `stack`; the graph is lowered in place."""
    run_passes(lowering_passes(target.backend), component.model)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdc-timed-")))
    built = build_engine(component, target, folder)
    files = tuple(folder / name for name in built.files)
    return stack.enter_context(open_session(EngineSource(component.spec, target.backend, files, built.options)))
