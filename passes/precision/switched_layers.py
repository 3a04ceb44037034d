"""One graph in which every layer can be quantised or not, by an input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sdc.passes.matching import add_initializer
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.plan import PrecisionPlan
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.range_rules import DEFAULT_RULE, RangeRule

SWITCHES = "sdc.switches"
"""Name of the extra input: bool, [number of layers of the plan]; true where a layer has its planned format."""


def switch_layers(
    model: ir.Model, table: CalibrationTable | None, plan: PrecisionPlan, rule: RangeRule = DEFAULT_RULE
) -> ir.Model:
    """A copy of `model` with the layers of `plan` behind switches.

    Before → after, for layer i::

        y = Conv(x, w)  →  y = Conv(Where(switches[i], DQ(Q(x)), x), Where(switches[i], DQ(q), w))

    Args:
        model: in float32; it is not changed.
        table: ranges, where the plan quantises activations.
        plan: of this graph; layers in floating point have a switch without effect.
        rule: how activations' ranges follow from the table.
    """
    switched = model.clone()
    layers = {layer.node.outputs[0].name: layer.node for layer in find_layers(switched)[0]}
    originals = {name: tuple(node.inputs[:2]) for name, node in layers.items()}
    weights = {value.name: value for value in switched.graph.initializers.values()}
    # Not what convolutions write: that would stay quantised with the switch off.
    InsertQdq(table, plan, rule=replace(rule, results=False)).run(switched)
    graph = switched.graph
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(plan.layers)]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(switches)
    for index, planned in enumerate(plan.layers):
        node = layers[planned.name]
        place = add_initializer(graph, np.array(index, np.int64), f"{SWITCHES}.{index}")
        switch = ir.node("Gather", [switches, place])
        changed = [slot for slot in (0, 1) if node.inputs[slot] is not originals[planned.name][slot]]
        if not changed:
            continue
        graph.insert_before(node, switch)
        for slot in changed:
            original = originals[planned.name][slot]
            assert original is not None  # layers have both operands
            if original.name in weights and original.name not in graph.initializers:
                graph.register_initializer(original)
            chosen = ir.node("Where", [switch.outputs[0], node.inputs[slot], original])
            chosen.outputs[0].shape, chosen.outputs[0].type = original.shape, original.type
            graph.insert_before(node, chosen)
            node.replace_input_with(slot, chosen.outputs[0])
    return switched
