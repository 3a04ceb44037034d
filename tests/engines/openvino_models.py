"""OpenVINO models in sessions, and what the plugin makes of them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import openvino
from attention_reference import bits_from_floats, floats_from_bits
from openvino import opset13 as operators

from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.openvino import OpenVinoSession
from sdc.engines.specs import ComponentSpec


def constant(values: np.ndarray, element_type: str = "f32"):
    """Rounded here, as OpenVINO's conversion of constants to bf16 cuts bits off."""
    if element_type == "bf16":
        values = floats_from_bits(bits_from_floats(values.astype(np.float32)))
    return operators.convert(operators.constant(values.astype(np.float32)), element_type)


def named(model: openvino.Model, *inputs: str) -> openvino.Model:
    """With the names of its inputs, by default one "x", and the first output "y"."""
    for port, name in zip((*model.inputs, model.outputs[0]), (*(inputs or ("x",)), "y"), strict=True):
        port.get_tensor().set_names({name})
    return model


def open_model(spec: ComponentSpec, model: openvino.Model, folder: Path, precision: str) -> OpenVinoSession:
    """A session of a model that is saved in a folder."""
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    files = (folder / "model.xml", folder / "model.bin")
    session = open_session(EngineSource(spec, "openvino", files, {"inference_precision": precision}))
    assert isinstance(session, OpenVinoSession)
    return session


def executed(session: OpenVinoSession) -> list[str]:
    """The kinds of nodes that the plugin runs; the session has run."""
    assert session._engine is not None
    running = session._engine.model.get_runtime_model()
    return [node.get_rt_info()["layerType"].astype(str) for node in running.get_ops()]


def operators_alive(kind: type) -> int:
    """How many operators of a class there are."""
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())
