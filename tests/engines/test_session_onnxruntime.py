import sys
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.workshop.memory import PeakMemory
from sdc.engines.errors import BundleError, InputError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime import RUN_FEW_TIMES, RUN_IN_ORDER
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS


@pytest.fixture
def source(small_unet, tmp_path):
    built = build_engine(small_unet.component, TARGETS["ort-cpu"], tmp_path)
    files = tuple(tmp_path / name for name in built.files)
    return EngineSource(small_unet.component.spec, "onnxruntime", files, built.options)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (3, 10, 14), (4, 32, 6)])
def test_equals_numpy_at_several_shapes(source, small_unet, batch, height, width):
    feeds = small_unet.feeds(batch=batch, height=height, width=width)
    with open_session(source, threads=1) as session:
        result = session.run(feeds)["out_sample"]
    assert result.dtype == np.float32
    # 28 float32 products of size 1: rounding stays below 28 * 2**-24 * 28.
    np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


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


def test_refuses_feeds_outside_the_interface(source, small_unet):
    with open_session(source) as session, pytest.raises(InputError, match="W must be a multiple of 2, found 13"):
        session.run(small_unet.feeds(width=13))


def test_runs_on_the_cpu_provider_alone(source):
    with open_session(source) as session:
        assert session._session.get_providers() == ["CPUExecutionProvider"]


def own_bytes() -> int:
    """Resident memory of this process that is no file's; proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_the_second_run_takes_no_more_memory_than_the_first(tmp_path):
    """ONNX Runtime's memory pattern would give all activations a second block."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    links = (("Sin", "x", "a"), ("Cos", "a", "b"), ("Sin", "b", "y"))
    nodes = [onnx.helper.make_node(kind, [before], [after]) for kind, before, after in links]
    graph = onnx.helper.make_graph(nodes, "sines", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    x = np.ones(1 << 22, np.float32)
    tensors = ((TensorSpec(name, "float32", ("N",)),) for name in ("x", "y"))
    spec = ComponentSpec("unet", *tensors, {"N": DimensionRange(1, x.size, x.size)})
    with open_session(EngineSource(spec, "onnxruntime", (tmp_path / "model.onnx",))) as session:
        session.run({"x": x})
        after_one = own_bytes()
        session.run({"x": x})
        assert own_bytes() - after_one < x.nbytes / 4


def test_memory_and_close(source):
    session = open_session(source)
    assert session.memory_bytes == sum(file.stat().st_size for file in source.files) > 0
    session.close()
    session.close()
    assert session.memory_bytes == 0


@pytest.mark.parametrize("content", [b"", b"\x08", b"\0" * 100])
def test_refuses_a_corrupt_graph(source, content):
    source.files[0].write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is not an engine that onnxruntime can read"):
        open_session(source)


def test_refuses_truncated_weights(source):
    source.files[1].write_bytes(source.files[1].read_bytes()[:100])
    with pytest.raises(BundleError, match="is not an engine that onnxruntime can read"):
        open_session(source)


def test_refuses_an_engine_with_other_tensors(source, small_unet, tmp_path):
    spec = small_unet.component.spec
    other = type(spec)(spec.name, spec.inputs[:2], spec.outputs, spec.dimensions)
    with pytest.raises(BundleError, match="expected tensors"):
        open_session(EngineSource(other, source.backend, source.files))


def save_observed_chain(path: Path, *, length: int) -> ComponentSpec:
    """A chain of tensors as large as its input; one output has the maximum of each, read where it is written."""
    nodes, rows = [], []
    for index in range(length):
        nodes += [
            onnx.helper.make_node("Neg", [f"x{index}"], [f"x{index + 1}"]),
            onnx.helper.make_node("ReduceMax", [f"x{index + 1}"], [f"m{index}"], keepdims=1),
        ]
        rows.append(f"m{index}")
    nodes.append(onnx.helper.make_node("Concat", rows, ["maxima"], axis=0))
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in ("x0", "maxima")]
    graph = onnx.helper.make_graph(nodes, "chain", tensors[:1], tensors[1:])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    free = {"N": DimensionRange(1, 2**21, 2**21)}
    inputs, outputs = ((TensorSpec(name, "float32", ("N",)),) for name in ("x0", "maxima"))
    return ComponentSpec("unet", inputs, outputs, free)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's high-water mark")
def test_what_runs_in_order_holds_no_tensor_for_longer_than_the_file_says(tmp_path):
    spec = save_observed_chain(tmp_path / "chain.onnx", length=40)
    x = np.linspace(1, 2, 2**21, dtype=np.float32)  # 8 MiB
    source = EngineSource(spec, "onnxruntime", (tmp_path / "chain.onnx",), {RUN_FEW_TIMES: True, RUN_IN_ORDER: True})
    with open_session(source, threads=1) as session, PeakMemory() as memory:
        before = psutil.Process().memory_info().rss
        maxima = session.run({"x0": x})["maxima"]
    np.testing.assert_array_equal(maxima, [-1, 2] * 20)
    assert memory.peak_bytes - before < 10 * x.nbytes  # of 40
