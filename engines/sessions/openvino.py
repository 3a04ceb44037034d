"""Engines in OpenVINO's intermediate representation, on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino

from sdc.engines.errors import TargetError
from sdc.engines.kernels.library import Kernels, find_kernels
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds
from sdc.engines.sessions.openvino_attention import Replacements, replace_attention
from sdc.engines.sessions.source import EngineSource
from sdc.engines.specs import ComponentSpec

PRECISIONS = ("auto", "f32", "bf16")


class OpenVinoSession:
    """A compiled OpenVINO model.

    The engine's option ``inference_precision`` says what floating-point arithmetic may be done in: "f32"; "bf16"; or
    "auto", which is bf16 where the processor has bf16 instructions (AVX512_BF16 or AMX) and f32 elsewhere. In bf16
    attention runs in kernels of our own where there are any (`sdc.engines.kernels`).
    """

    def __init__(self, source: EngineSource, *, threads: int | None = None) -> None:
        self.spec = source.spec
        self._compiled: openvino.CompiledModel | None
        self._compiled, self._replacements = compile_engine(source, threads)
        weakref.finalize(self, self._replacements.release)
        self._request: openvino.InferRequest | None = self._compiled.create_infer_request()
        self._weight_bytes = sum(file.stat().st_size for file in source.files[1:])
        self._set: HeldFeeds | None = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._request is not None, "the session is closed"
            arrays = held.complete(others)
            if self._set is not held:  # an infer request keeps the tensors that were set last
                arrays |= held.arrays
            self._set = None
            # The memory of feeds is read in place, only during a call; the results are copied out of the request's own.
            results = self._request.infer(arrays, share_inputs=True, share_outputs=False)
            self._set = held
            return {tensor.name: results[tensor.name] for tensor in self.spec.outputs}

        return run

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights; OpenVINO does not tell what activations take."""
        return self._weight_bytes

    def close(self) -> None:
        """Release the model; may be called twice."""
        self._request = self._compiled = self._set = None
        self._replacements.release()
        self._weight_bytes = 0

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def compile_engine(source: EngineSource, threads: int | None) -> tuple[openvino.CompiledModel, Replacements]:
    """An engine as a session runs it, and what was put into it: to be released when it is not used any more.

    Args:
        source: the engine's files.
        threads: CPU threads; None leaves it to OpenVINO.

    Raises:
        BundleError: the files are not those of an engine with this interface.
        TargetError: the engine's option ``inference_precision`` is unknown.
    """
    core = openvino.Core()
    try:
        model = core.read_model(source.files[0])
    except RuntimeError as error:
        raise source.unreadable(error) from error
    expected = {tensor.name for tensor in (*source.spec.inputs, *source.spec.outputs)}
    found = {name for port in (*model.inputs, *model.outputs) for name in port.names}
    if not expected <= found:
        raise source.unreadable(f"expected tensors {sorted(expected)}, found {sorted(found)}")
    settings = compile_settings(core, source.options, threads)
    replacements = _replace_attention(model, source.spec, settings["INFERENCE_PRECISION_HINT"])
    try:
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        replacements.release()
        raise source.unreadable(error) from error
    replacements.compiled = True
    return compiled, replacements


def _replace_attention(model: openvino.Model, spec: ComponentSpec, precision: str) -> Replacements:
    """Use the kernels for attention where there are any and they compute in the engine's precision."""
    kernels = find_kernels() if precision == "bf16" else None
    if not isinstance(kernels, Kernels):
        return Replacements()
    shapes = {
        tensor.name: tuple(size if isinstance(size, int) else spec.dimensions[size].optimum for size in tensor.shape)
        for tensor in spec.inputs
    }
    return replace_attention(model, kernels, shapes)


def compile_settings(core: openvino.Core, options: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    """How every engine is compiled.

    Args:
        core: of the process.
        options: the engine's own.
        threads: CPU threads; None leaves it to OpenVINO.

    Raises:
        TargetError: the engine's option ``inference_precision`` is unknown.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # Where weights alone are quantised OpenVINO would round activations to 8 bits too, unasked: 0.5 % of error.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": inference_precision(core, options.get("inference_precision", "f32")),
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def inference_precision(core: openvino.Core, wanted: str) -> str:
    """OpenVINO's precision hint for an engine's option.

    Raises:
        TargetError: the option is none of ``PRECISIONS``.
    """
    if wanted not in PRECISIONS:
        raise TargetError(f"inference_precision must be one of {', '.join(PRECISIONS)}, found {wanted!r}")
    if wanted == "auto":
        return "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    return wanted
