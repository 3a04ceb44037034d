"""Activations of large engines: in one arena, given back when an engine is closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime_arena import SharedArena
from sdc.engines.sessions.onnxruntime_regions import OWN, SHARED, SMALL_ENGINE_BYTES, regions_of
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

MIB = 1 << 20
WIDTH = 3072
"""Of a weight of 36 MiB, which makes an engine a large one."""
ROWS = 4096
IMAGE_BYTES = 4 * ROWS * WIDTH
"""Of each activation: 48 MiB."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[EngineSource]:
    """Two engines: y = sin (cos (x)) w."""
    return [make_source(tmp_path_factory.mktemp("arena"), scale) for scale in (0.5, 2.0)]


def make_source(folder: Path, scale: float) -> EngineSource:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", WIDTH]) for name in ("x", "y")]
    nodes = [
        onnx.helper.make_node("Cos", ["x"], ["a"]),
        onnx.helper.make_node("Sin", ["a"], ["b"]),
        onnx.helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    weight = onnx.numpy_helper.from_array(scale * np.eye(WIDTH, dtype=np.float32), "w")
    graph = onnx.helper.make_graph(nodes, "product", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    x, y = (TensorSpec(name, "float32", ("N", WIDTH)) for name in ("x", "y"))
    return EngineSource(
        ComponentSpec("unet", (x,), (y,), {"N": DimensionRange(1, ROWS, ROWS)}),
        "onnxruntime",
        (folder / "model.onnx",),
    )


def own_bytes() -> int:
    """Resident memory of this process that is no file's; proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_large_engines_share_an_arena() -> None:
    assert regions_of(SMALL_ENGINE_BYTES - 1) is OWN
    assert regions_of(SMALL_ENGINE_BYTES) is SHARED


@linux
def test_engines_have_their_activations_in_the_same_place_and_give_it_back(sources: list[EngineSource]) -> None:
    x = np.linspace(-3, 3, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    with open_session(sources[0], threads=1) as first, open_session(sources[1], threads=1) as second:
        loaded = own_bytes()
        results = [session.run({"x": x})["y"] for session in (first, second)]
        beside = own_bytes() - loaded - 2 * IMAGE_BYTES
        assert beside >= 2 * IMAGE_BYTES, "two images at a time, of one engine"
        assert beside < 2 * IMAGE_BYTES + SHARED.first_bytes / 32 + 16 * MIB
        second.close()
        assert own_bytes() - loaded < 2 * IMAGE_BYTES + 16 * MIB, "the results stay, and lie elsewhere"
        again = first.run({"x": x})["y"]
    np.testing.assert_array_equal(again, results[0])
    np.testing.assert_allclose(results[0], 0.5 * np.sin(np.cos(x)), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(results[1], 4 * results[0])


LIMITED = 8 * MIB
"""An arena in which not one image fits."""


def test_an_arena_that_another_library_had_before_is_not_taken(sources: list[EngineSource]) -> None:
    script = f"""
import sys
from pathlib import Path
import numpy as np
import onnxruntime as ort
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, ort.OrtArenaCfg({LIMITED}, -1, -1, -1))
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
x, y = (TensorSpec(name, "float32", ("N", {WIDTH})) for name in ("x", "y"))
spec = ComponentSpec("unet", (x,), (y,), {{"N": DimensionRange(1, {ROWS}, {ROWS})}})
with open_session(EngineSource(spec, "onnxruntime", (Path(sys.argv[1]),)), threads=1) as session:
    print(session.run({{"x": np.zeros(({ROWS}, {WIDTH}), np.float32)}})["y"][1, 1])
"""
    command = [sys.executable, "-c", script, str(sources[0].files[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.5 * np.sin(1.0))


def test_sessions_have_arenas_of_their_own_where_none_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.31 takes every registration, so a refusal has to be made; older versions are allowed too."""

    def refuse(*_: object) -> None:
        raise RuntimeError("registered already")

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", refuse)
    options = onnxruntime.SessionOptions()
    arena = SharedArena()
    assert not arena.share(options)
    with pytest.raises(RuntimeError):
        options.get_session_config_entry("session.use_env_allocators")
    arena.give_back()
