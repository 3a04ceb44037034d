"""`rtx`, `sm75` … `sm121`: one TensorRT for RTX plan, built without a GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import tensorrt_rtx as trt

from sdc.compiler.build.built import BuiltEngine, one_line, save_onnx, staging
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError, TargetError
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import Target
from sdc.passes.sparse_weights import count_sparse_layers

log = logging.getLogger(__name__)

FUSED_HEAD_SIZES = range(12, 257)
"""Head sizes for which float16 attention has a dedicated kernel on every target, float32 attention none.

Source: builds of one attention each for sm75, sm86 and sm120 with TensorRT for RTX 1.7.1.
"""

FIRST_SPARSE_CAPABILITY = 80
"""Tensor cores skip the zeros of 2:4 weights from Ampere on. Source: Mishra et al., arXiv:2104.08378, section 3."""


def build_tensorrt(component: Component, target: Target, folder: Path) -> BuiltEngine:
    """Write `<target>.plan`: strongly typed, so that every type is the graph's, for all GPUs of the target.

    The optimization profile is the interface's dimension ranges. TF32 is off: a float32 graph computes in float32.
    Kernels for sparse weights are allowed where any layer's weights are 2:4 and a GPU of the target has them.

    Raises:
        TargetError: this TensorRT cannot build for the target.
        ExportError: TensorRT refuses the graph; parser errors name their nodes.
    """
    begin = time.perf_counter()
    plan = f"{target.name}.plan"
    messages = _Messages()
    with staging(folder, (plan,)) as temporary:
        save_onnx(component.model, temporary / "model.onnx")
        builder = trt.Builder(messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        network.name = component.spec.name  # else a counter of the process, which would differ from build to build
        parser = trt.OnnxParser(network, messages)
        if not parser.parse_from_file(str(temporary / "model.onnx")):
            raise ExportError(
                f"TensorRT cannot read the graph of {component.spec.name}: {one_line(_parser_errors(parser))}"
            )
        attentions = _allow_unfused_attention(network)
        sparse = count_sparse_layers(component.model)
        use_sparsity = sparse.sparse > 0 and has_sparse_kernels(target)
        config = _make_config(builder, component.spec, target, sparse=use_sparsity)
        with (temporary / plan).open("wb") as file:
            done = builder.build_serialized_network_to_stream(network, config, _PlanFile(file))
        if not done:
            raise ExportError(
                f"TensorRT cannot build {component.spec.name} for {target.name}: {one_line(messages.errors())}",
                hint=_hint(target),
            )
        layers = network.num_layers
    unfused = count_unfused_attentions(component.model)
    if unfused:
        log.info("%s: TensorRT has no fused kernel for %d of %d attentions", component.spec.name, unfused, attentions)
    return BuiltEngine(
        files=(plan,),
        options={},
        built_with={"tensorrt_rtx": trt.__version__},
        seconds=time.perf_counter() - begin,
        details={
            "layers": layers,
            "attentions": attentions,
            "attentions_without_fused_kernel": unfused,
            "weighted_layers": sparse.weighted,
            "weighted_layers_2_4": sparse.sparse,
            "sparse_weights": use_sparsity,
        },
    )


class _PlanFile(trt.IStreamWriter):  # type: ignore[misc]  # tensorrt_rtx has no types: its classes are Any
    """Takes a plan in parts: as a whole it would be in memory once more."""

    def __init__(self, file: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self._file = file

    def write(self, data: bytes) -> int:
        """TensorRT calls this for every part; returns how much of it was written."""
        return self._file.write(data)


class _Messages(trt.ILogger):  # type: ignore[misc]  # likewise
    """Keeps TensorRT's errors for our own, and passes the rest on to the log."""

    LEVELS: Mapping[Any, int] = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.INFO,
        trt.ILogger.INFO: logging.DEBUG,
    }

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """TensorRT calls this for every message."""
        level = self.LEVELS.get(severity)
        if level == logging.ERROR:
            self._errors.append(message)
        if level is not None:
            log.log(min(level, logging.INFO), "TensorRT: %s", message)

    def errors(self) -> str:
        """The distinct errors so far."""
        return "; ".join(dict.fromkeys(self._errors)) or "it gave no reason"


def _hint(target: Target) -> str | None:
    """Turing has no float32 matrix products in TensorRT for RTX ("FP32 GEMM is not supported")."""
    return "for sm75 every matrix product must be float16 or int8" if "sm75" in target.compute_capabilities else None


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name() or '(unnamed)'} ({error.node_operator()}): {error.desc()}" for error in errors
    )


def _allow_unfused_attention(network: Any) -> int:
    """Let TensorRT compute attention in several kernels where it has no fused one; returns the number of attentions.

    Without this permission it refuses such a graph; where it has a fused kernel the plan is the same with it.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding's way of casting down
            layer.attention.decomposable = True
            count += 1
    return count


def has_sparse_kernels(target: Target) -> bool:
    """Whether any GPU of the target has sparse tensor cores; for others in the plan TensorRT takes dense kernels."""
    return any(int(name.removeprefix("sm")) >= FIRST_SPARSE_CAPABILITY for name in target.compute_capabilities)


def _make_config(builder: Any, spec: ComponentSpec, target: Target, *, sparse: bool) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, name in enumerate(target.compute_capabilities):
        known = trt.ComputeCapability.__members__
        if name.upper() not in known:
            raise TargetError(
                f"TensorRT for RTX {trt.__version__} cannot build for {name}",
                hint=f"it knows {', '.join(each.lower() for each in known if each.startswith('SM'))}",
            )
        config.set_compute_capability(known[name.upper()], index)
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        profile.set_shape(tensor.name, *_profile_shapes(spec, tensor))
    config.add_optimization_profile(profile)
    return config


def _profile_shapes(spec: ComponentSpec, tensor: TensorSpec) -> tuple[list[int], list[int], list[int]]:
    """Smallest, usual and largest shape of an input."""
    ranges = [None if isinstance(size, int) else spec.dimensions[size] for size in tensor.shape]
    fixed = [size if isinstance(size, int) else 0 for size in tensor.shape]
    return (
        [size if each is None else each.minimum for size, each in zip(fixed, ranges, strict=True)],
        [size if each is None else each.optimum for size, each in zip(fixed, ranges, strict=True)],
        [size if each is None else each.maximum for size, each in zip(fixed, ranges, strict=True)],
    )


def count_unfused_attentions(model: ir.Model) -> int:
    """How many `Attention` operators TensorRT will compute in several kernels, by head size and type."""
    return sum(node.op_type == "Attention" and not _has_fused_kernel(node) for node in model.graph)


def _has_fused_kernel(attention: ir.Node) -> bool:
    query = attention.inputs[0]
    if query is None or query.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) or query.shape is None:
        return False
    heads = attention.attributes.get_int("q_num_heads", 1)
    width = query.shape[-1]
    return isinstance(width, int) and width // (heads if len(query.shape) == 3 else 1) in FUSED_HEAD_SIZES
