"""A network small enough to build in milliseconds, with its answer in NumPy, and a bundle of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.manifest import (
    SCHEMA,
    EngineEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    PipelineSettings,
    TargetEntry,
)
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS

if "PYTEST_XDIST_WORKER" in os.environ:
    # Of torch, in this process and those that it starts, before any imports it: workers with as many threads each as
    # there are processors wait for each other, ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL_UNET = """
<ir_version: 10, opset_import: ["" : 23]>
unet (float[B,3,H,W] sample, float[1] timestep, float[B,5,7] encoder_hidden_states) => (float[B,6,H,W] out_sample)
<float[5] mean_weights = {0.1, -0.3, 0.5, 0.7, 0.2}> {
    context = MatMul (mean_weights, encoder_hidden_states)
    projected = MatMul (context, projection)
    scaled = Mul (projected, timestep)
    axes = Constant <value_ints = [2, 3]> ()
    shift = Unsqueeze (scaled, axes)
    features = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (sample, kernel)
    out_sample = Add (features, shift)
}
"""


@dataclass(frozen=True)
class SmallUnet:
    """A 3x3 convolution plus a shift from the prompt and the timestep; the interface of a UNet."""

    component: Component
    kernel: np.ndarray
    projection: np.ndarray

    def feeds(self, *, batch: int = 3, height: int = 10, width: int = 14, seed: int = 5) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        return {
            "sample": generator.standard_normal((batch, 3, height, width), dtype=np.float32),
            "timestep": np.array([1.25], np.float32),
            "encoder_hidden_states": generator.standard_normal((batch, 5, 7), dtype=np.float32),
        }

    def answer(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """`out_sample` in float64."""
        padded = np.pad(feeds["sample"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        features = np.einsum("bchwij,ocij->bohw", windows, self.kernel)
        context = np.einsum("t,btd->bd", [0.1, -0.3, 0.5, 0.7, 0.2], feeds["encoder_hidden_states"])
        return features + (context @ self.projection * feeds["timestep"])[:, :, None, None]


@pytest.fixture(scope="session")
def small_unet() -> SmallUnet:
    generator = np.random.default_rng(11)
    kernel = generator.standard_normal((6, 3, 3, 3), dtype=np.float32)
    projection = generator.standard_normal((7, 6), dtype=np.float32)
    model = ir.from_proto(onnx.parser.parse_model(SMALL_UNET))
    uses = [(node, index, value) for node in model.graph for index, value in enumerate(node.inputs) if value]
    for name, array in (("kernel", kernel), ("projection", projection)):
        weight = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        model.graph.register_initializer(weight)
        for node, index, value in uses:
            if value.name == name:
                node.replace_input_with(index, weight)
    spec = ComponentSpec(
        name="unet",
        inputs=(
            TensorSpec("sample", "float32", ("B", 3, "H", "W")),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("encoder_hidden_states", "float32", ("B", 5, 7)),
        ),
        outputs=(TensorSpec("out_sample", "float32", ("B", 6, "H", "W")),),
        dimensions={
            "B": DimensionRange(1, 2, 4),
            "H": DimensionRange(4, 8, 32, 2),
            "W": DimensionRange(4, 12, 32, 2),
        },
    )
    return SmallUnet(Component(spec, model), kernel, projection)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own, empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SDC_CACHE", str(folder))
    return folder


@pytest.fixture
def heeded_interrupt() -> Iterator[None]:
    """SIGINT is not ignored, here and in what is started, though whoever started the tests may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def pristine_bundle(small_unet: SmallUnet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once: copy it, do not change it."""
    folder = tmp_path_factory.mktemp("pristine") / "bundle"
    targets = {}
    for name in ("ort-cpu", "cpu"):
        built = build_engine(small_unet.component, TARGETS[name], folder / "unet")
        engine = EngineEntry(tuple(f"unet/{file}" for file in built.files), built.options)
        targets[name] = TargetEntry(TARGETS[name].backend, built.built_with, (), {"unet": engine})
    (folder / "unet" / "rtx.plan").write_bytes(b"no plan")
    engine = EngineEntry(("unet/rtx.plan",), {})
    capabilities = TARGETS["rtx"].compute_capabilities
    targets["rtx"] = TargetEntry("tensorrt_rtx", {"tensorrt_rtx": "1.7.1.116"}, capabilities, {"unet": engine})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    manifest = Manifest(
        schema=SCHEMA,
        sdc_version="0.1.0",
        model=ModelEntry("small", "made up", (), "random"),
        precision="fp32",
        fused=True,
        components={"unet": small_unet.component.spec},
        pipeline=PipelineSettings(0.5, 0.0, 4, 3, 48, 64, 5, None),
        targets=targets,
        files={
            path.relative_to(folder).as_posix(): FileEntry(
                hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    )
    (folder / "sdc.json").write_text(json.dumps(manifest.to_json()))
    return folder


@pytest.fixture
def small_bundle(pristine_bundle: Path, tmp_path: Path, cache: Path) -> Path:
    """A bundle of `small_unet` for cpu and ort-cpu, with a plan for rtx that is none; to be changed at will."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_manifest(small_bundle: Path) -> Callable[[Callable[[dict], None]], None]:  # type: ignore[type-arg]
    """Change `small_bundle`'s manifest as JSON."""

    def edit(change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
        path = small_bundle / "sdc.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit
