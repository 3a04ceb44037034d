"""A graph that was exported before, with the weights that LoRAs change: what an export would give, without tracing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.compiler.build.built import save_onnx
from sdc.compiler.load import Checkpoint
from sdc.compiler.load.networks import network_of
from sdc.compiler.trace.check import compare_with_reference, example_feeds, run_module, small_sizes
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.traceable import traceable_module

log = logging.getLogger(__name__)


def patch_component(
    checkpoint: Checkpoint, name: str, configs: Mapping[str, Mapping[str, Any]], *, base: Path, path: Path
) -> float | None:
    """Write the graph of one component from that of the same checkpoint without LoRAs, and compare it with its module.

    A weight has its module's own name in the graph, and the layout that the operator asks for. So the bytes are those
    that `export_component` writes.

    Args:
        checkpoint: with LoRAs.
        name: of the component.
        configs: as for `export_component`.
        base: the graph without LoRAs.
        path: of the new graph; its weights go beside it.

    Returns:
        The largest difference to the module, relative to its largest output value; None if `base` does not have all
        the weights under their own names, each for an operator that is known, and nothing was written.

    Raises:
        ExportError: the graph computes something else than the module.
    """
    spec = component_spec(name, configs)
    model = ir.load(base)
    layers = {layer for lora in checkpoint.loras for layer in lora.updates.get(network_of(name), {})}
    changed = {f"{layer}.weight": _is_transposed(model.graph.initializers.get(f"{layer}.weight")) for layer in layers}
    unknown = [weight for weight, transposed in changed.items() if transposed is None]
    if unknown:
        log.info("%s: the exported graph does not say where %s is", name, unknown[0])
        return None
    module = traceable_module(checkpoint, name)
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=int(configs["text_encoder"]["vocab_size"]))
    expected = run_module(module, spec, feeds)
    for weight, transposed in changed.items():
        folded = module.get_parameter(f"network.{weight}").detach().numpy()
        stored = np.ascontiguousarray(folded.T) if transposed else folded
        model.graph.initializers[weight].const_value = ir.tensor(stored, name=weight)
    save_onnx(model, path)
    del model, module  # their weights go before the graph is loaded
    difference = compare_with_reference(path, spec, feeds, expected)
    log.info("%s: %d weights changed, largest difference to torch %.1e", name, len(changed), difference)
    return difference


def _is_transposed(weight: ir.Value | None) -> bool | None:
    """Whether a graph has a weight as [inputs, outputs], which torch has as [outputs, inputs, ...]; None: not known."""
    found = set() if weight is None else {_reads_transposed(use.node, use.idx) for use in weight.uses()}
    return found.pop() if len(found) == 1 else None


def _reads_transposed(node: ir.Node, index: int) -> bool | None:
    if index == 1 and node.op_identifier() == ("", "MatMul", ""):
        return True
    if index == 1 and node.op_identifier() == ("", "Gemm", ""):
        return not node.attributes.get_int("transB", 0)
    return False if index == 1 and node.op_identifier() == ("", "Conv", "") else None
