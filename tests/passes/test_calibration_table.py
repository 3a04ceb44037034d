"""The table in JSON, and the digest that ties it to a graph."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_denoiser, make_feeds, make_fused_denoiser, make_table, measure_table

from sdc.engines.errors import InputError
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibration_table import CalibrationTable


def test_json_round_trip():
    table = measure_table(make_denoiser(), make_feeds())
    assert CalibrationTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1, expected 3"),
        ({"ranges": None}, "malformed"),
        ({"latent_size": [5]}, "malformed"),
        ({"timesteps": [1.0, 2.0]}, "differ in length"),
    ],
)
def test_damaged_json_is_refused(change: dict[str, object], message: str):
    value = make_table(make_denoiser(), {"x": 1.0}).to_json() | change
    with pytest.raises(InputError, match=message):
        CalibrationTable.from_json(value)


def test_missing_entry_is_refused():
    value = make_table(make_denoiser(), {"x": 1.0}).to_json()
    del value["prompts"]
    with pytest.raises(InputError, match="prompts"):
        CalibrationTable.from_json(value)


def test_digest_is_the_graphs():
    assert digest_from_model(make_denoiser()) == digest_from_model(make_denoiser())
    assert digest_from_model(make_denoiser().clone()) == digest_from_model(make_denoiser())
    fused = ir.serde.deserialize_model(ir.to_proto(make_fused_denoiser()))
    assert digest_from_model(fused) == digest_from_model(make_fused_denoiser())


def test_whatever_is_computed_changes_the_digest():
    def weight(model: ir.Model) -> None:
        value = model.graph.initializers["w_prompt_2"]
        array = value.const_value.numpy().copy()
        array[3, 5] = np.nextafter(array[3, 5], np.float32(9))
        value.const_value = ir.tensor(array)

    def attribute(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "GroupNormalization")
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 2e-5)

    def operator(model: ir.Model) -> None:
        next(node for node in model.graph if node.op_type == "Sigmoid").op_type = "Tanh"

    def wiring(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "Attention")
        node.replace_input_with(2, node.inputs[1])

    def name(model: ir.Model) -> None:
        model.graph[5].outputs[0].name = "renamed"

    def opset(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 24

    def body(model: ir.Model) -> None:
        function = next(iter(model.functions.values()))
        next(iter(function)).op_type = "Tanh"

    digests = {digest_from_model(make_fused_denoiser())}
    changes = (weight, attribute, operator, wiring, name, opset, body)
    for change in changes:
        model = make_fused_denoiser()
        change(model)
        digests.add(digest_from_model(model))
    assert len(digests) == len(changes) + 1


def test_metadata_does_not_change_the_digest():
    model = make_denoiser()
    model.metadata_props["note"] = "a note"
    model.graph[3].name = "another"
    assert digest_from_model(model) == digest_from_model(make_denoiser())
