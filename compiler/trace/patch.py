"""A graph that was exported before, with the weights that LoRAs change: what an export would give, without tracing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

    The exporter keeps a module's own names for its weights, and their layout. So the bytes are those that
    `export_component` writes.

    Args:
        checkpoint: with LoRAs.
        name: of the component.
        configs: as for `export_component`.
        base: the graph without LoRAs.
        path: of the new graph; its weights go beside it.

    Returns:
        The largest difference to the module, relative to its largest output value; None if `base` does not have all
        the weights under their own names, and nothing was written.

    Raises:
        ExportError: the graph computes something else than the module.
    """
    spec = component_spec(name, configs)
    model = ir.load(base)
    layers = {layer for lora in checkpoint.loras for layer in lora.updates.get(network_of(name), {})}
    changed = sorted(f"{layer}.weight" for layer in layers)
    missing = [weight for weight in changed if weight not in model.graph.initializers]
    if missing:
        log.info("%s: the exported graph has no %s", name, missing[0])
        return None
    module = traceable_module(checkpoint, name)
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=int(configs["text_encoder"]["vocab_size"]))
    expected = run_module(module, spec, feeds)
    for weight in changed:
        folded = module.get_parameter(f"network.{weight}").detach()
        model.graph.initializers[weight].const_value = ir.tensor(folded.numpy(), name=weight)
    save_onnx(model, path)
    del model, module  # their weights go before the graph is loaded
    difference = compare_with_reference(path, spec, feeds, expected)
    log.info("%s: %d weights changed, largest difference to torch %.1e", name, len(changed), difference)
    return difference
