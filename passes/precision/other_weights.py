"""What was found for a graph, tied to one of the same layers with other weights, such as a LoRA's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.plan import PrecisionPlan
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.smooth_quant import smooth


def table_for(model: ir.Model, table: CalibrationTable) -> CalibrationTable:
    """The table of a fused graph, tied to `model`, which has the same layers; `model` is smoothed on the way.

    Ranges and factors stay what was measured with the weights before; for these weights they hold as far as activations
    are alike. A table that belongs to `model` comes back as it is.

    Raises:
        InputError: the layers of `model` read other tensors, or channels; or the table does not say how its graph was
            smoothed.
    """
    digest = digest_from_model(model)
    if digest == table.source_digest:
        return table
    read = {layer.activation.name or "": layer.channels for layer in find_layers(model)[0]}
    found = {name: len(each.channel_means) for name, each in table.tensors.items()}
    _check_same("calibration", found, read)
    if table.smoothing is None:
        return replace(table, graph_digest=digest)
    if table.smoothing.factors is None:
        raise InputError(
            "the calibration is of an earlier version of sdc, which did not keep what it smoothed by",
            hint="export the bundle again",
        )
    try:
        smoothing = smooth(model, replace(table.smoothing, graph_digest=digest))
    except PassError as error:
        raise InputError(f"the calibration does not fit this graph: {error}", hint="export the bundle again") from error
    return replace(table, graph_digest=digest_from_model(model), smoothing=smoothing)


def plan_for_weights(model: ir.Model, plan: PrecisionPlan) -> PrecisionPlan:
    """The plan of a fused graph, tied to `model`, which has the same layers.

    Raises:
        InputError: it has not.
    """
    layers = {layer.node.outputs[0].name or "": layer.weight_shape for layer in find_layers(model)[0]}
    _check_same("precision plan", {layer.name: layer.shape for layer in plan.layers}, layers)
    return replace(plan, graph_digest=digest_from_model(model))


def _check_same(what: str, planned: Mapping[str, object], found: Mapping[str, object]) -> None:
    unlike: Iterable[str] = (name for name in {**planned, **found} if planned.get(name) != found.get(name))
    first = next(iter(unlike), None)
    if first is not None:
        raise InputError(
            f"the {what} is of another architecture or version of sdc: {first} is {planned.get(first)} there and "
            f"{found.get(first)} here",
            hint="export the bundle again",
        )
