"""The buffer graphs of a bundle's engines: those that it carries, or those of its .onnx files."""

from __future__ import annotations

from sdc.compiler.memory.graph_json import MEMORY_REPORT, graph_from_json
from sdc.engines.bundle import Bundle
from sdc.engines.checked_json import read_json
from sdc.engines.errors import BundleError, InputError, PassError
from sdc.engines.processor import cpu_flags
from sdc.engines.targets import ONNXRUNTIME, OPENVINO
from sdc.passes.memory.buffers import BufferGraph
from sdc.passes.memory.from_graph import buffers_from_graph

_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Source: Linux arch/x86/include/asm/cpufeatures.h. Where one of them is OpenVINO computes in bf16 if it may."""


def engine_graphs(bundle: Bundle, target: str) -> dict[str, BufferGraph]:
    """The buffers of every engine of a target, by component.

    Raises:
        BundleError: the bundle says nothing of an engine, and its file holds no graph that can be read.
        TargetError: the bundle has no such target.
    """
    engines = bundle.manifest.targets[bundle.target(target).name].engines
    carried = _carried_graphs(bundle, target)
    return {
        component: carried.get(component) or _graph_of_file(bundle, engine.files[0], component)
        for component, engine in engines.items()
    }


def _carried_graphs(bundle: Bundle, target: str) -> dict[str, BufferGraph]:
    if MEMORY_REPORT not in bundle.manifest.files:
        return {}
    graphs = {}
    for component, targets in read_json(bundle.file(MEMORY_REPORT)).members():
        for name, value in targets.members():
            if name != target:
                continue
            if isinstance(value.value, str):
                raise BundleError(
                    f"the memory of {component} for {target} cannot be planned: {value.value}",
                    hint="see `sdc run` for what it takes",
                )
            graphs[component] = graph_from_json(value)
    return graphs


def _graph_of_file(bundle: Bundle, name: str, component: str) -> BufferGraph:
    if not name.endswith(".onnx"):
        raise BundleError(
            f"the bundle {bundle.path} does not say what {component} takes, and {name} holds no graph that can be read",
            hint="export it again: bundles of this version of sdc carry their engines' buffers",
        )
    import onnx_ir as ir

    try:
        return buffers_from_graph(ir.load(bundle.file(name)))
    except PassError as error:
        raise InputError(f"the memory of {name} cannot be planned: {error}") from error


def floating_bits(backend: str, inference_precision: object) -> int | None:
    """Bits of the type in which a backend on this machine keeps floating-point activations; None for the graph's own.

    Args:
        backend: what runs the engine.
        inference_precision: the engine's option of that name, for OpenVINO.
    """
    if backend == ONNXRUNTIME:
        return 32  # the CPU has no 16-bit kernels: everything is cast
    if backend != OPENVINO:
        return None
    in_bf16 = inference_precision == "bf16" or (inference_precision == "auto" and computes_in_bf16())
    return 16 if in_bf16 else 32


def computes_in_bf16() -> bool:
    """Whether this processor does."""
    return not _BF16.isdisjoint(cpu_flags())
