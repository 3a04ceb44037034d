"""Executed kernels and written bytes of graphs whose kernels are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_denoiser import make_model

from sdc.compiler.build import build_engine
from sdc.compiler.compare.execution import execute_watched
from sdc.compiler.compare.footprint import take_footprint
from sdc.compiler.component import Component
from sdc.engines.errors import TargetError
from sdc.engines.sessions import EngineSource
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS

TEXT = """
<ir_version: 10, opset_import: ["": 23]>
g (float[B, 3, H, H] x) => (float[B, 5, H, H] y)
<int64[2] rows = {0, -1}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    s = Shape (r)
    flat = Reshape (r, rows)
    soft = Softmax <axis = 1> (flat)
    y = Reshape (soft, s)
}
"""
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", 3, "H", "H")),),
    (TensorSpec("y", "float32", ("B", 5, "H", "H")),),
    {"B": DimensionRange(1, 2, 4), "H": DimensionRange(2, 6, 8)},
)
RESULT_BYTES = 2 * 5 * 6 * 6 * 4
FEEDS = {"x": np.ones((2, 3, 6, 6), np.float32)}


def engine(target: str, folder: Path) -> EngineSource:
    weight = np.random.default_rng(3).standard_normal((5, 3, 3, 3)).astype(np.float32)
    model = make_model(TEXT, {"w": weight})
    built = build_engine(Component(SPEC, model), TARGETS[target], folder)
    files = tuple(folder / name for name in built.files)
    return EngineSource(SPEC, TARGETS[target].backend, files, built.options, TARGETS[target].compute_capabilities)


def test_onnx_runtime_executes_the_fused_convolution_once(tmp_path: Path) -> None:
    """Conv and Relu are one kernel; aliases count as kernels and write nothing."""
    found = execute_watched(engine("ort-cpu", tmp_path), FEEDS, 1)
    kinds = dict(found.kernels)
    assert "Relu" not in kinds
    assert sum(count for kind, count in kinds.items() if "Conv" in kind) == 1
    assert (kinds["Reshape"], kinds["Softmax"], kinds["Shape"]) == (2, 1, 1)
    assert found.count == sum(kinds.values())
    conversions = sum(count for kind, count in kinds.items() if kind.startswith("Reorder"))
    assert found.largest_bytes is not None
    # The convolution's own layout has its 5 channels padded to a block, and is then brought back.
    assert found.largest_bytes in ({RESULT_BYTES // 5 * block for block in (8, 16)} if conversions else {RESULT_BYTES})
    assert found.written_bytes == found.largest_bytes + (1 + conversions) * RESULT_BYTES + 4 * 8


def test_openvino_counts_neither_data_nor_what_is_computed_once(tmp_path: Path) -> None:
    found = execute_watched(engine("cpu", tmp_path), FEEDS, 1)
    kinds = dict(found.kernels)
    assert kinds["Convolution"] == 1
    assert kinds["Softmax"] == 1
    assert not {"Const", "Input", "Output", "Reshape"} & set(kinds)
    assert found.largest_bytes is not None
    assert found.largest_bytes >= RESULT_BYTES
    again = execute_watched(engine("cpu", tmp_path / "again"), FEEDS, 2)
    assert again == found


def test_openvino_counts_no_preparation_of_weights(tmp_path: Path) -> None:
    """A MatMul's weights are transposed when the model is compiled, by nodes that stay in the execution graph."""
    model = make_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[B, 7] x) => (float[B, 9] y) { y = MatMul (x, w) }',
        {"w": np.ones((7, 9), np.float32)},
    )
    spec = ComponentSpec(
        "unet",
        (TensorSpec("x", "float32", ("B", 7)),),
        (TensorSpec("y", "float32", ("B", 9)),),
        {"B": DimensionRange(1, 2, 4)},
    )
    built = build_engine(Component(spec, model), TARGETS["cpu"], tmp_path)
    source = EngineSource(spec, "openvino", (tmp_path / built.files[0],), built.options)
    found = execute_watched(source, {"x": np.ones((3, 7), np.float32)}, 1)
    assert dict(found.kernels) == {"FullyConnected": 1}
    assert found.written_bytes == 3 * 9 * 4


def test_bytes_follow_the_size(tmp_path: Path) -> None:
    source = engine("cpu", tmp_path)
    small = execute_watched(source, FEEDS, 1)
    large = execute_watched(source, {"x": np.ones((4, 3, 6, 6), np.float32)}, 1)
    assert large.kernels == small.kernels
    assert large.largest_bytes == 2 * (small.largest_bytes or 0)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be counted"):
        execute_watched(EngineSource(SPEC, "abacus", (tmp_path,)), FEEDS, 1)


@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_a_footprint_is_taken_elsewhere(target: str, tmp_path: Path) -> None:
    ballast = np.ones(300 << 20, np.uint8)  # held here, and so not in the child's peak
    found = take_footprint(engine(target, tmp_path), FEEDS, threads=1)
    assert 20e6 < found.peak_memory_bytes < ballast.nbytes
    assert found.outputs["y"].shape == (2, 5, 6, 6)
    assert found.outputs["y"].sum() == pytest.approx(2, rel=1e-5)
    assert found.execution.count >= 2


@pytest.mark.gpu
def test_a_plan_tells_its_layers(tmp_path: Path) -> None:
    from sdc.engines.gpu import find_gpus

    gpus = find_gpus()
    assert not isinstance(gpus, str)
    target = TARGETS[gpus[0].compute_capability]
    source = engine(target.name, tmp_path)
    assert execute_watched(source, FEEDS, None).count >= 1
