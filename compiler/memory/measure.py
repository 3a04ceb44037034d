"""What engines and pipelines really take: the high-water mark of a fresh process, the libraries' own part aside."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.compiler.memory.engine_plan import Request
from sdc.compiler.workshop.worker import Worker
from sdc.engines import load
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import ExportError
from sdc.engines.specs import ComponentSpec
from sdc.engines.targets import BACKEND_MODULES, ONNXRUNTIME, OPENVINO

_RUNS = 2
"""The second run of a size may lay its memory out anew."""

_RUN = """
import sys
from sdc.compiler.cli import main
code = main(sys.argv[1:])
from sdc.compiler.workshop.memory import high_water_bytes
print(high_water_bytes())
sys.exit(code)
"""
"""`sdc` with a last line that says what it took."""


@dataclass(frozen=True)
class Measured:
    """A process's resident memory.

    Attributes:
        libraries_bytes: with the interpreter and the backend's library in it, which ran a small model.
        peak_bytes: the most while the work was done.
    """

    libraries_bytes: int
    peak_bytes: int

    @property
    def work_bytes(self) -> int:
        """What the work took."""
        return self.peak_bytes - self.libraries_bytes


def measure_engine(
    bundle: Path, target: str, component: str, sizes: dict[str, int], *, threads: int | None = None
) -> Measured:
    """Load one engine in a fresh process and run it twice with random inputs of given sizes.

    Scripts that call this need the usual ``if __name__ == "__main__":``; likewise `measure_pictures`.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: the process died.
        TargetError: this machine cannot run the target.
    """
    return _measure(bundle, target, _run_engine, str(bundle), target, component, sizes, threads)


def measure_pictures(
    bundle: Path,
    target: str,
    request: Request,
    *,
    steps: int = 2,
    threads: int | None = None,
    keep_loaded: bool = True,
) -> Measured:
    """Draw pictures in a fresh process.

    Raises:
        SdcError: as `measure_engine`; InputError: the request is outside of what the bundle takes.
    """
    return _measure(bundle, target, _draw, str(bundle), target, request, steps, threads, keep_loaded)


def measure_run(bundle: Path, target: str, request: Request, *, steps: int = 2, threads: int | None = None) -> int:
    """Bytes of a process that is `sdc run`, all that is in it.

    Raises:
        ExportError: it failed; the message has its own.
    """
    with tempfile.TemporaryDirectory(prefix="sdc-measure-") as folder:
        arguments: list[object] = ["run", bundle, "--target", target, "--prompt", "a photo", "--seed", 0]
        arguments += ["--steps", steps, "--batch", request.pictures, "--guidance", request.guidance_scale]
        arguments += ["--height", request.height_px, "--width", request.width_px, "--out", f"{folder}/a.png"]
        arguments += [] if threads is None else ["--threads", threads]
        arguments += ["--deepcache", steps] if request.deepcache else []
        arguments += [] if request.prefetch else ["--no-prefetch"]
        command = [sys.executable, "-c", _RUN, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"`sdc run` ended with code {done.returncode}: {done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def _measure(bundle: Path, target: str, work: Callable[..., None], *arguments: Any) -> Measured:
    module = BACKEND_MODULES[open_bundle(bundle, verify=False).manifest.targets[target].backend]
    with (
        tempfile.TemporaryDirectory(prefix="sdc-measure-") as folder,
        Worker(log_path=Path(folder, "worker.log")) as worker,
    ):
        libraries = worker.call(_import_libraries, module)
        done = worker.call(work, *arguments)
    return Measured(libraries.peak_memory_bytes, done.peak_memory_bytes)


def _import_libraries(module: str) -> None:
    backend = importlib.import_module(module)
    importlib.import_module("sdc.engines.pipeline")
    if module in _SMALL_MODELS:
        _SMALL_MODELS[module](backend)


def _run_openvino(openvino: Any) -> None:
    """Its plugin, and the code of its kernels, are read with the first model."""
    operators = openvino.opset13
    image = operators.parameter([1, 16, 8, 8], np.float32)
    kernel = operators.constant(np.ones((16, 16, 3, 3), np.float32))
    product = operators.convolution(image, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    product = operators.matmul(product, np.ones((8, 8), np.float32), False, False)
    model = openvino.Model([product], [image])
    openvino.compile_model(model, "CPU")([np.zeros((1, 16, 8, 8), np.float32)])


def _run_onnxruntime(onnxruntime: Any) -> None:
    """Likewise: a convolution and a product."""
    image, kernel, matrix = (ir.Value(name=name) for name in ("image", "kernel", "matrix"))
    image.shape, image.type = ir.Shape([1, 16, 8, 8]), ir.TensorType(ir.DataType.FLOAT)
    kernel.const_value = ir.tensor(np.ones((16, 16, 3, 3), np.float32), name="kernel")
    matrix.const_value = ir.tensor(np.ones((6, 6), np.float32), name="matrix")
    convolution = ir.node("Conv", [image, kernel])
    product = ir.node("MatMul", [convolution.outputs[0], matrix])
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [image], product.outputs, nodes=[convolution, product], initializers=[kernel, matrix], opset_imports={"": 21}
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    session.run(None, {"image": np.zeros((1, 16, 8, 8), np.float32)})


_SMALL_MODELS = {BACKEND_MODULES[OPENVINO]: _run_openvino, BACKEND_MODULES[ONNXRUNTIME]: _run_onnxruntime}


def _run_engine(bundle: str, target: str, component: str, sizes: dict[str, int], threads: int | None) -> None:
    opened = open_bundle(bundle, verify=False)
    feeds = random_feeds(opened.manifest.components[component], sizes)
    with opened.load_session(component, opened.choose_target(target), threads=threads) as session:
        for _ in range(_RUNS):
            session.run(feeds)


def random_feeds(spec: ComponentSpec, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of given sizes: normal, token ids all 1."""
    generator = np.random.default_rng(0)
    feeds = {}
    for tensor in spec.inputs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        integers = tensor.dtype == "int64"
        feeds[tensor.name] = np.ones(shape, np.int64) if integers else generator.standard_normal(shape, np.float32)
    return feeds


def _draw(bundle: str, target: str, request: Request, steps: int, threads: int | None, keep_loaded: bool) -> None:
    loaded = load(bundle, target, verify=False, threads=threads, keep_loaded=keep_loaded, prefetch=request.prefetch)
    with loaded as pipe:
        pipe(
            "a photo",
            steps=steps,
            seed=0,
            batch=request.pictures,
            height=request.height_px,
            width=request.width_px,
            guidance_scale=request.guidance_scale,
            deepcache=steps if request.deepcache else 1,
            measures=request.measures,
        )
