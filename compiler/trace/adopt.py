"""Graphs that were exported elsewhere take the interface of a component: names, order, types and free dimensions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.compiler.build.built import one_line, save_onnx
from sdc.compiler.trace.check import example_feeds, small_sizes
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.run_graph import relative_difference, run_graph
from sdc.compiler.trace.widen import widen_to_float32
from sdc.engines.errors import ExportError, InputError
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.passes.simplify.convert_opset import NEWEST, OLDEST

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-6, "float16": 0.03}
"""Largest difference to the graph as it came, relative to the largest value. A float32 graph is only renamed. One in
float16 is computed anew in float32, and a hundred layers rounded to 11 bits are off by about 0.01."""

_DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}


def adopt_graph(source: Path, name: str, configs: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    """Write the graph in `source` with the interface of a component, and compare the two.

    - Inputs and outputs are those of the interface, in its order; further outputs are left out.
    - float16 becomes float32 throughout: the weights stay what they are, and a precision is chosen later.
    - A timestep without a dimension, or an integer one, gets what the interface says.
    - Free dimensions carry the interface's symbols; what other symbols said of sizes inside is forgotten.

    Args:
        source: the graph, weights inside or beside it.
        name: one of ``COMPONENTS``.
        configs: full configurations of all networks: see `component_spec`.
        path: of the graph that is written; its weights go beside it.

    Returns:
        The largest difference, relative to the largest output value.

    Raises:
        InputError: the graph is in an opset or of operators that cannot be compiled, has another interface than its
            configuration says, or has a fixed size where a free one is needed.
        ExportError: the written graph computes something else than `source`.
    """
    spec = component_spec(name, configs)
    model = ir.load(source)
    _check_operators(model, source)
    _order(model.graph.inputs, spec.inputs, source, "input")
    _order(model.graph.outputs, spec.outputs, source, "output")
    widened = widen_to_float32(model)
    for value, tensor in zip(list(model.graph.inputs), spec.inputs, strict=True):
        _fit_input(model, value, tensor, source)
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        _check_shape(value, tensor, source)
        if value.dtype != _DTYPES[tensor.dtype]:
            raise InputError(f"{source} gives {value.name} as {value.dtype}, expected {tensor.dtype}")
    _forget_sizes(model)
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(tensor.shape)
    model.graph.name, model.producer_name, model.producer_version = spec.name, "sdc", None
    save_onnx(model, path)
    del model
    tolerance = TOLERANCE["float16" if widened else "float32"]
    return _compare(source, path, spec, int(configs["text_encoder"]["vocab_size"]), tolerance)


def _check_operators(model: ir.Model, source: Path) -> None:
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    if not OLDEST <= version <= NEWEST:
        raise InputError(
            f"{source} is in opset {version}, expected {OLDEST} to {NEWEST}", hint="export it again: --opset 18"
        )
    own = {(domain, name) for domain, name, _ in model.functions}
    foreign = {
        f"{node.domain}.{node.op_type}"
        for node in model.graph.all_nodes()
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in own
    }
    if foreign:
        raise InputError(
            f"{source} holds operators that are not ONNX's own: {', '.join(sorted(foreign))}",
            hint="it was optimised for one runtime already; export it without (no --optimize)",
        )


def _order(values: MutableSequence[ir.Value], tensors: Sequence[TensorSpec], source: Path, kind: str) -> None:
    """Bring the graph's inputs or outputs into the interface's order, without further outputs."""
    found = {value.name: value for value in values}
    names = [tensor.name for tensor in tensors]
    missing = [name for name in names if name not in found]
    superfluous = [str(name) for name in found if name not in names]
    if missing or (superfluous and kind == "input"):
        raise InputError(
            f"{source} has the {kind}s {', '.join(map(str, found))}; expected {', '.join(names)}",
            hint="names are those of optimum's own export for the task text-to-image",
        )
    values[:] = [found[name] for name in names]


def _fit_input(model: ir.Model, value: ir.Value, tensor: TensorSpec, source: Path) -> None:
    """Give an input the interface's type and shape; what reads it gets the type and rank that it was made for."""
    dtype, rank = value.dtype, None if value.shape is None else len(value.shape)
    is_timestep = tensor.name == "timestep"
    if not is_timestep or rank != 0:
        _check_shape(value, tensor, source)
    if dtype != _DTYPES[tensor.dtype] and not (is_timestep and dtype in (ir.DataType.INT64, ir.DataType.INT32)):
        raise InputError(f"{source} takes {value.name} as {dtype}, expected {tensor.dtype}")
    readers = list(value.uses())
    current, nodes = value, []
    if dtype != _DTYPES[tensor.dtype]:
        nodes.append(ir.node("Cast", [current], attributes={"to": dtype}))
        current = nodes[-1].outputs[0]
    if rank == 0:
        scalar = ir.tensor(np.array([], np.int64), name=f"{tensor.name}_scalar_shape")
        shape = ir.Value(name=scalar.name, const_value=scalar, shape=ir.Shape([0]), type=ir.TensorType(scalar.dtype))
        model.graph.register_initializer(shape)
        nodes.append(ir.node("Reshape", [current, shape]))
        current = nodes[-1].outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, current)
    for count, node in enumerate(nodes):
        node.outputs[0].name = f"{tensor.name}_as_traced_{count}"
    model.graph.insert_before(model.graph[0], nodes)
    value.dtype, value.shape = _DTYPES[tensor.dtype], ir.Shape(tensor.shape)


def _check_shape(value: ir.Value, tensor: TensorSpec, source: Path) -> None:
    """Raise if the graph is made for another size than the interface's, or for one where the interface has a range."""
    if value.shape is None:
        return
    found = [size if isinstance(size, int) else str(size.value or "?") for size in value.shape]
    written = f"[{', '.join(map(str, found))}]"
    if len(found) != len(tensor.shape) or any(
        isinstance(size, int) and isinstance(wanted, int) and size != wanted
        for size, wanted in zip(found, tensor.shape, strict=False)
    ):
        wanted = ", ".join(map(str, tensor.shape))
        raise InputError(
            f"{source} has {tensor.name} {written}, but its configuration says [{wanted}]",
            hint="its config.json belongs to another graph",
        )
    fixed = [
        wanted for size, wanted in zip(found, tensor.shape, strict=True) if isinstance(size, int) and wanted != size
    ]
    if fixed:
        raise InputError(
            f"{source} has {tensor.name} {written}: {', '.join(map(str, fixed))} must be free",
            hint="export it with dynamic axes (no --no-dynamic-axes)",
        )


def _forget_sizes(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = None


def _compare(source: Path, path: Path, spec: ComponentSpec, vocabulary: int, tolerance: float) -> float:
    feeds = [example_feeds(spec, small_sizes(spec), vocabulary=vocabulary)]
    try:
        (expected,), (found,) = run_graph(source, feeds), run_graph(path, feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ExportError(f"ONNX Runtime cannot run {source}: {one_line(error)}", hint="export it again") from error
    difference = max(relative_difference(found[tensor.name], expected[tensor.name]) for tensor in spec.outputs)
    if not difference <= tolerance:
        raise ExportError(
            f"{source} computes something else under the interface of {spec.name}: the difference is {difference:.1e} "
            f"of the largest value, expected at most {tolerance:.0e}",
            hint="please report this with the tool that exported it",
        )
    log.info("%s: largest difference to %s %.1e", spec.name, source, difference)
    return difference
