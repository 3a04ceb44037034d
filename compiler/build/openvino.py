"""`cpu`: OpenVINO's intermediate representation."""

from __future__ import annotations

import time
from pathlib import Path

import onnx_ir as ir
import openvino

from sdc.compiler.build.built import BuiltEngine, one_line, save_onnx, staging, weight_bits_option
from sdc.compiler.build.fold_pairs import fold_pairs
from sdc.compiler.build.fold_sizes import fold_sizes
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError
from sdc.engines.sessions.openvino_core import openvino_core

FILES = ("openvino_model.xml", "openvino_model.bin")

_REDUCED = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear"}
_ROW_RANK = 2
"""Of timesteps, their conditions and numbers of tokens; images and states of tokens have more axes."""


def build_openvino(component: Component, folder: Path) -> BuiltEngine:
    """Write `openvino_model.xml` and `.bin` (optimum-intel's names).

    The weights stay in the types that the graph gives them. The engine's option ``inference_precision`` is "f32" for a
    graph in pure float32, so that it is really computed so, and for a small one of which parts have to be; for any
    other it is "auto", since on a CPU a float16 type says how much precision is needed, not what to compute in.

    Raises:
        ExportError: OpenVINO refuses the graph.
    """
    begin = time.perf_counter()
    with staging(folder, FILES) as temporary:
        save_onnx(component.model, temporary / "model.onnx")
        try:
            model = openvino_core().read_model(temporary / "model.onnx")
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO refuses the graph of {component.spec.name}: {one_line(error)}",
                hint="`sdc doctor` shows the version; report it together with the graph",
            ) from error
        _name_operators(model)
        fold_sizes(model)
        fold_pairs(model)
        openvino.save_model(model, temporary / FILES[0], compress_to_fp16=False)
    return BuiltEngine(
        files=FILES,
        options={"inference_precision": _inference_precision(component), **weight_bits_option(component.model)},
        built_with={"openvino": openvino.__version__.split("-")[0]},
        seconds=time.perf_counter() - begin,
        details={"operators": len(model.get_ops())},
    )


def _inference_precision(component: Component) -> str:
    """The engine's option of that name.

    In bf16 OpenVINO computes what has float32 in the graph in bf16 too; in f32 it leaves to bf16 what has bf16 in the
    graph, where the processor has it. Our kernels, which images need, are there in bf16 alone. So f32 suits engines
    without images that have

    - the angles of sinusoids: at a timestep of 501, of which bf16 makes 500 or 502, the time embedding of SD 1.5 was
      27 % off, and that was nearly all of the error of a step;
    - float32 sums over all layers: the error of SD 1.5's text encoder, mean of twelve inputs, is 0.0068, and in bf16
      0.0076 (OpenVINO 2026.4 with AMX, in the same time; by hand).
    """
    graph = component.model.graph
    if not has_reduced_precision(component.model):
        return "f32"
    rows_only = all(len(tensor.shape) <= _ROW_RANK for tensor in component.spec.inputs)
    return "f32" if rows_only and (_makes_sinusoids(graph) or _sums_in_float32(graph)) else "auto"


def _makes_sinusoids(graph: ir.Graph) -> bool:
    return any(node.op_type in ("Sin", "Cos") for node in graph)


def _sums_in_float32(graph: ir.Graph) -> bool:
    """Whether a graph in bfloat16 adds something to a sum in float32."""
    in_bfloat16 = any(value.dtype == ir.DataType.BFLOAT16 for value in graph.initializers.values())
    sums = {node.outputs[0] for node in graph if node.op_type == "Add" and node.outputs[0].dtype == ir.DataType.FLOAT}
    return in_bfloat16 and any(value in sums for total in sums for value in _operands(total))


def _operands(value: ir.Value) -> tuple[ir.Value | None, ...]:
    node = value.producer()
    return () if node is None else tuple(node.inputs)


def _name_operators(model: openvino.Model) -> None:
    """Name the operators that the ONNX frontend left unnamed by their place, not by a counter of the process.

    Otherwise two builds in one process would differ in their bytes.
    """
    for index, operator in enumerate(model.get_ordered_ops()):
        if operator.get_friendly_name() == operator.get_name():
            operator.set_friendly_name(f"unnamed/{operator.get_type_name()}_{index}")


def has_reduced_precision(model: ir.Model) -> bool:
    """Whether any value of the graph is of 16 bits or any operator quantises."""
    return any(value.dtype in _REDUCED for value in model.graph.initializers.values()) or any(
        node.op_type in _QUANTIZING
        or _cast_type(node) in _REDUCED
        or any(each.dtype in _REDUCED for each in node.outputs)
        for node in model.graph
    )


def _cast_type(node: ir.Node) -> int | None:
    """What a Cast casts to; a graph need not say the types of its values."""
    return node.attributes.get_int("to") if node.op_type == "Cast" else None
