from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino
import pytest
from mapped_pages import mapped_file, resident_bytes
from openvino import opset13 as operators

from sdc.compiler.build import build_engine
from sdc.engines.errors import BundleError, InputError, TargetError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.openvino import inference_precision
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.engines.sessions.openvino_operators import copy_small_constants
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS


@pytest.fixture
def source(small_unet, tmp_path):
    built = build_engine(small_unet.component, TARGETS["cpu"], tmp_path)
    return EngineSource(
        spec=small_unet.component.spec,
        backend="openvino",
        files=tuple(tmp_path / name for name in built.files),
        options=built.options,
        origin="'cpu' was built for the CPU with openvino 2026",
    )


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (3, 10, 14), (4, 32, 6)])
def test_equals_numpy_at_several_shapes(source, small_unet, batch, height, width):
    feeds = small_unet.feeds(batch=batch, height=height, width=width)
    with open_session(source, threads=1) as session:
        result = session.run(feeds)["out_sample"]
    assert result.dtype == np.float32
    # 28 float32 products of size 1: rounding stays below 28 * 2**-24 * 28.
    np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


def test_is_compiled_for_the_first_size_and_once_more_for_all_others(source, small_unet):
    sizes = [{"batch": 2, "height": 8, "width": 12}, {"batch": 2, "height": 8, "width": 8}, {"batch": 1, "height": 10}]
    with open_session(source) as session:
        engines = []
        for size in (sizes[0], *sizes, sizes[0]):
            feeds = small_unet.feeds(**size)
            np.testing.assert_allclose(session.run(feeds)["out_sample"], small_unet.answer(feeds), atol=5e-5, rtol=0)
            engines.append(session._engine)
    assert engines[0] is engines[1]
    assert engines[0].shapes == {name: array.shape for name, array in small_unet.feeds(**sizes[0]).items()}
    assert not any(port.get_partial_shape().is_dynamic for port in engines[0].model.inputs)
    assert engines[2] is engines[3] is engines[4] is not engines[1]
    assert engines[2].shapes is None


def test_the_engine_of_one_size_is_freed_when_others_come(source, small_unet):
    with open_session(source) as session:
        session.run(small_unet.feeds())
        first = weakref.ref(session._engine)
        session.run(small_unet.feeds(height=8))
        gc.collect()
        assert first() is None


def test_held_feeds_go_to_the_engine_that_other_sizes_need(source, small_unet):
    feeds = {height: small_unet.feeds(height=height, seed=height) for height in (4, 8)}
    with open_session(source) as session:
        runs = {}
        for height, given in feeds.items():
            runs[height] = session.hold({name: value for name, value in given.items() if name != "sample"})
        for height in (4, 8, 8, 4):
            result = runs[height]({"sample": feeds[height]["sample"]})["out_sample"]
            np.testing.assert_allclose(result, small_unet.answer(feeds[height]), atol=5e-5, rtol=0)


def test_runs_after_a_size_that_could_not_be_compiled(source, small_unet):
    feeds = small_unet.feeds()
    with open_session(source) as session:
        expected = session.run(feeds)["out_sample"]
        session._settings["NO_SUCH_PROPERTY"] = 1  # which OpenVINO refuses
        with pytest.raises(BundleError, match="NO_SUCH_PROPERTY"):
            session.run(small_unet.feeds(height=8))
        del session._settings["NO_SUCH_PROPERTY"]
        np.testing.assert_array_equal(session.run(feeds)["out_sample"], expected)


def test_results_survive_the_next_run_and_feeds_stay(source, small_unet):
    feeds = small_unet.feeds(seed=1)
    kept = {name: array.copy() for name, array in feeds.items()}
    with open_session(source) as session:
        first = session.run(feeds)["out_sample"]
        copy = first.copy()
        session.run(small_unet.feeds(seed=2))
    np.testing.assert_array_equal(first, copy)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, kept[name])


def test_takes_feeds_that_are_not_contiguous(source, small_unet):
    feeds = small_unet.feeds(batch=2, height=8, width=12)
    strided = dict(feeds, sample=np.ascontiguousarray(feeds["sample"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    assert not strided["sample"].flags.c_contiguous
    with open_session(source) as session:
        np.testing.assert_array_equal(session.run(strided)["out_sample"], session.run(feeds)["out_sample"])


def test_refuses_feeds_outside_the_interface(source, small_unet):
    with open_session(source) as session, pytest.raises(InputError, match="H must be from 4 to 32, found 34"):
        session.run(small_unet.feeds(height=34))


def test_f32_and_bf16_are_what_they_say(source, small_unet):
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bf16 arithmetic")
    feeds, errors = small_unet.feeds(), {}
    for precision in ("f32", "bf16", "auto"):
        changed = EngineSource(source.spec, source.backend, source.files, {"inference_precision": precision})
        with open_session(changed) as session:
            errors[precision] = np.abs(session.run(feeds)["out_sample"] - small_unet.answer(feeds)).max()
    assert errors["f32"] < 5e-5
    # bf16 keeps 8 bits: 2**-9 of a result of size 10, and more from the operands.
    assert 2e-3 < errors["bf16"] < 0.5
    assert errors["auto"] == errors["bf16"]


def test_refuses_an_unknown_precision():
    with pytest.raises(TargetError, match="must be one of auto, f32, bf16, found 'f16'"):
        inference_precision(openvino_core(), "f16")


def test_uses_the_threads_it_is_given(source, small_unet):
    with open_session(source, threads=1) as session:
        session.run(small_unet.feeds())
        assert session._engine.model.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_keeps_no_pages_of_the_file_whose_weights_it_has_copied(tmp_path):
    """Half a megabyte of a convolution's weights, which OpenVINO computes with in a layout of its own."""
    x = operators.parameter([-1, 256, 4, 4], openvino.Type.f32)
    weights = np.random.default_rng(0).standard_normal((64, 256, 3, 3), np.float32)
    y = operators.convolution(x, operators.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([y], [x], "convolution")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    batch = {"B": DimensionRange(1, 1, 2)}
    tensors = (TensorSpec(name, "float32", ("B", channels, 4, 4)) for name, channels in (("x", 256), ("y", 64)))
    spec = ComponentSpec("vae_decoder", *((tensor,) for tensor in tensors), batch)
    files = (tmp_path / "model.xml", tmp_path / "model.bin")
    with open_session(EngineSource(spec, "openvino", files)) as session:
        session.run({"x": np.ones((1, 256, 4, 4), np.float32)})
        assert resident_bytes(files[1]) < files[1].stat().st_size / 8


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_small_constants_are_copied_out_of_the_mapped_file(tmp_path):
    x = operators.parameter([1, 300], openvino.Type.f32)
    weights = np.random.default_rng(0).standard_normal((300, 300), np.float32)
    biases = (np.arange(300, dtype=np.float32), np.full((1, 300), 0.1, ml_dtypes.bfloat16))
    y = operators.matmul(x, operators.constant(weights), False, False)
    y = operators.add(y, operators.constant(biases[0]))
    bias = openvino.Tensor(biases[1].view(np.uint16), [1, 300], openvino.Type.bf16)
    y = operators.add(y, operators.convert(operators.constant(bias), "f32"))
    openvino.save_model(openvino.Model([y], [x], "sums"), tmp_path / "model.xml", compress_to_fp16=False)
    model = openvino_core().read_model(tmp_path / "model.xml")

    def constants():
        return [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]

    def mapped():
        return [bool(mapped_file(int(node.data.ctypes.data))) for node in constants()]

    names = [node.get_friendly_name() for node in constants()]
    assert mapped() == [True, True, True]
    copy_small_constants(model)
    assert mapped() == [True, False, False]
    assert [node.get_friendly_name() for node in constants()] == names
    feeds = np.ones((1, 300), np.float32)
    (found,) = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([feeds]).values()
    np.testing.assert_allclose(found, feeds @ weights + biases[0] + biases[1].astype(np.float32), rtol=1e-4)


def test_memory_and_close(source):
    session = open_session(source)
    assert session.memory_bytes == source.files[1].stat().st_size > 0
    session.close()
    session.close()
    assert session.memory_bytes == 0


@pytest.mark.parametrize("content", [b"", b"<net", b"<?xml version='1.0'?><net/>", b"\0" * 100])
def test_refuses_a_corrupt_graph(source, content):
    source.files[0].write_bytes(content)
    with pytest.raises(BundleError, match=r"openvino_model\.xml is not an engine .* 'cpu' was built for the CPU"):
        open_session(source)


def test_refuses_truncated_weights(source):
    source.files[1].write_bytes(source.files[1].read_bytes()[:100])
    with pytest.raises(BundleError, match="is not an engine that openvino can read"):
        open_session(source)


def test_refuses_an_engine_with_other_tensors(source, small_unet):
    text = source.files[0].read_text().replace("out_sample", "other")
    source.files[0].write_text(text)
    with pytest.raises(BundleError, match="expected tensors"):
        open_session(source)


def test_what_waits_for_memory_waits_before_it_is_compiled(
    source: EngineSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    compile_model = openvino.Core.compile_model

    def noted(*arguments: Any) -> Any:
        events.append("compile")
        return compile_model(*arguments)

    monkeypatch.setattr(type(openvino_core()), "compile_model", noted)
    shapes = {"sample": (2, 3, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 5, 7)}
    with open_session(source) as session:
        for _ in range(2):
            session.prepare(shapes, before_weights=lambda: events.append("wait"))
    assert events == ["wait", "compile"], "a second time there is nothing to wait for"


AFTER_SESSIONS = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from sdc.engines.bundle import open_bundle

faulthandler.enable()
bundle = open_bundle(Path(sys.argv[1]))
sessions = [bundle.load_session("unet", bundle.target("cpu")) for _ in range(3)]
for session in sessions:
    session.prepare({"sample": (2, 3, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 5, 7)})
while sessions:
    session = sessions.pop(0)
    session.close()
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("heeded", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_are_heeded_once_sessions_are_gone(pristine_bundle: Path) -> None:
    """They went in the order in which they came; each plugin of OpenVINO would have left the one before's stack."""
    run = [sys.executable, "-c", AFTER_SESSIONS, str(pristine_bundle)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "heeded\n"), done.stderr
