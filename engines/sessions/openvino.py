"""Engines in OpenVINO's intermediate representation, on the CPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino

from sdc.engines.environment import kernels_may_round_to_bytes
from sdc.engines.errors import TargetError
from sdc.engines.freed_memory import give_memory_back
from sdc.engines.kernels.library import Kernels, find_convolver, find_image_kernels, find_kernels
from sdc.engines.processor import WEIGHT_BITS, exact_weight_bits
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds, Shapes, shapes_of
from sdc.engines.sessions.mapped_files import read_once
from sdc.engines.sessions.openvino_attention import replace_attention
from sdc.engines.sessions.openvino_convolution import replace_convolutions
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.engines.sessions.openvino_gate import replace_gates
from sdc.engines.sessions.openvino_group_norm import replace_group_norms
from sdc.engines.sessions.openvino_layout import add_channels_last, interleave_channels_last, join_channels_last
from sdc.engines.sessions.openvino_operators import Replacements, copy_small_constants, round_constants
from sdc.engines.sessions.source import EngineSource
from sdc.engines.specs import ComponentSpec

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "f32", "bf16")
_MULTIPLY_BYTES = "LP_TRANSFORMS_MODE"
"""OpenVINO's property: whether products of dequantised tensors are computed in integers.

Source: OpenVINO, src/inference/dev_api/openvino/runtime/internal_properties.hpp; tried with 2026.4."""


@dataclass(frozen=True)
class CompiledEngine:
    """An engine in memory.

    Attributes:
        model: what OpenVINO runs.
        shapes: of the inputs by name, the only ones that it takes; None if it takes all of its interface.
        replacements: what was put into it; to be released when the model is not used any more.
    """

    model: openvino.CompiledModel
    shapes: Shapes | None
    replacements: Replacements

    def takes(self, shapes: Shapes) -> bool:
        """Whether it runs on inputs of these shapes; those of some of its inputs."""
        return self.shapes is None or shapes.items() <= self.shapes.items()


class OpenVinoSession:
    """An OpenVINO model, compiled when it is first run.

    OpenVINO runs a model faster if it knows all sizes. So it is compiled for those of the first run; should others
    come, once more, then for every size: compiling takes too long to be done at each change. If feeds of several sizes
    are held before the first run, for every size at once. The two round differently in int8, so there results depend on
    whether another size came before.

    The engine's option ``inference_precision`` says what floating-point arithmetic may be done in: "f32"; "bf16"; or
    "auto", which is bf16 where the processor has bf16 instructions (AVX512_BF16 or AMX) and f32 elsewhere. In bf16
    attention, group normalisation, and with AMX convolutions and gated layers run in kernels of our own where there are
    any (`sdc.engines.kernels`), attention in 8 bits where it is quantised.
    """

    def __init__(self, source: EngineSource, *, threads: int | None = None) -> None:
        self.spec = source.spec
        self._source = source
        self._settings = engine_settings(source, threads)
        self._model: openvino.Model | None = read_engine(source)
        self._engine: CompiledEngine | None = None
        self._request: openvino.InferRequest | None = None
        self._weight_bytes = sum(file.stat().st_size for file in source.files[1:])
        self._set: HeldFeeds | None = None
        self._sizes: dict[str, int] = {}
        self._has_sizes_to_come = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)
        if self._engine is None:
            known = [self._sizes.setdefault(symbol, size) == size for symbol, size in held.sizes.items()]
            self._has_sizes_to_come |= not all(known)

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            arrays = held.complete(others)
            # An infer request keeps the tensors that were set last; a new one has to be given all.
            if self._set is not held or self._engine is None or not self._engine.takes(shapes_of(arrays)):
                arrays |= held.arrays
            request = self._request_for(shapes_of(arrays))
            self._set = None
            # The memory of feeds is read in place, only during a call; the results are copied out of the request's own.
            results = request.infer(arrays, share_inputs=True, share_outputs=False)
            self._set = held
            return {tensor.name: results[tensor.name] for tensor in self.spec.outputs}

        return run

    def prepare(self, *shapes: Shapes, before_weights: Callable[[], object] = lambda: None) -> None:
        """Compile for inputs of these shapes, of several for every size; see `Preparable.prepare`."""
        self._has_sizes_to_come |= any(other != shapes[0] for other in shapes)
        self._request_for(shapes[0], before_weights)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights; OpenVINO does not tell what activations take."""
        return self._weight_bytes

    def close(self) -> None:
        """Release the model; may be called twice."""
        self._release()
        self._model = None
        self._weight_bytes = 0

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request_for(
        self, shapes: Shapes, before_weights: Callable[[], object] = lambda: None
    ) -> openvino.InferRequest:
        """The request of an engine that takes inputs of these shapes; of all inputs, where one has to be compiled."""
        assert self._model is not None, "the session is closed"
        if self._request is None or self._engine is None or not self._engine.takes(shapes):
            wanted = shapes if self._engine is None and not self._has_sizes_to_come else None
            self._release()
            with read_once(_weights_address(self._model)):  # OpenVINO copies weights into a layout of its own
                engine = compile_engine(self._model, self._source, self._settings, wanted, before_weights)
            give_memory_back()  # graphs as they were before they were compiled
            weakref.finalize(self, engine.replacements.release)
            self._request = engine.model.create_infer_request()
            self._engine = engine
        return self._request

    def _release(self) -> None:
        self._request = self._set = None
        if self._engine is not None:
            self._engine.replacements.release()
            self._engine = None


def read_engine(source: EngineSource) -> openvino.Model:
    """The model of an engine, its weights mapped into memory, small constants copied.

    It has to live as long as what is compiled from it: OpenVINO seems to tell weights that it
    has packed by where they lie.

    Raises:
        BundleError: the files are not those of an engine with this interface.
    """
    try:
        model = openvino_core().read_model(source.files[0])
    except RuntimeError as error:
        raise source.unreadable(error) from error
    expected = {tensor.name for tensor in (*source.spec.inputs, *source.spec.outputs)}
    found = {name for port in (*model.inputs, *model.outputs) for name in port.names}
    if not expected <= found:
        raise source.unreadable(f"expected tensors {sorted(expected)}, found {sorted(found)}")
    copy_small_constants(model)
    return model


def compile_engine(
    model: openvino.Model,
    source: EngineSource,
    settings: Mapping[str, Any],
    shapes: Shapes | None,
    before_weights: Callable[[], object] = lambda: None,
) -> CompiledEngine:
    """An engine as a session runs it.

    Args:
        model: as it was read; left as it is.
        source: where it was read from.
        settings: from `engine_settings`.
        shapes: of the inputs by name, all that it will be run with; None if that is not known.
        before_weights: called when the kernels have packed their weights, before OpenVINO packs its own.

    Raises:
        BundleError: OpenVINO cannot compile it.
    """
    model = model.clone()
    replacements = Replacements()
    try:
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        _use_kernels(model, settings["INFERENCE_PRECISION_HINT"], shapes or _usual(source.spec), replacements)
        round_constants(model)
        before_weights()
        compiled = openvino_core().compile_model(model, "CPU", settings)
    except BaseException as error:
        replacements.release()
        if isinstance(error, RuntimeError):
            raise source.unreadable(error) from error
        raise
    replacements.compiled = True
    return CompiledEngine(compiled, shapes, replacements)


def _use_kernels(model: openvino.Model, precision: str, shapes: Shapes, replacements: Replacements) -> None:
    """Put the kernels into a model where there are any and they compute in the engine's precision."""
    kernels = find_kernels() if precision == "bf16" else None
    if isinstance(kernels, Kernels):
        replace_attention(model, kernels, shapes, replacements, eight_bits=kernels_may_round_to_bytes())
        if find_image_kernels() is not None:
            replace_group_norms(model, kernels, shapes, replacements)
            interleave_channels_last(model, kernels, replacements)
            if (convolver := find_convolver()) is not None:
                replace_gates(model, convolver, shapes, replacements)
                replace_convolutions(model, convolver, shapes, replacements)
                add_channels_last(model)
                join_channels_last(model, kernels, replacements)


def _usual(spec: ComponentSpec) -> Shapes:
    """The shapes that an engine is tuned for."""
    return {
        tensor.name: tuple(size if isinstance(size, int) else spec.dimensions[size].optimum for size in tensor.shape)
        for tensor in spec.inputs
    }


def _weights_address(model: openvino.Model) -> int | None:
    """Where the largest constant of the model lies, in its mapped file; of 8 bits or more, as others have no array."""
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    wide = [node for node in constants if node.get_output_element_type(0).bitwidth >= 8]
    largest = max(wide, key=lambda node: int(node.get_byte_size()), default=None)
    return None if largest is None else int(largest.data.ctypes.data)


def engine_settings(source: EngineSource, threads: int | None) -> dict[str, Any]:
    """How an engine is compiled.

    Args:
        source: its files and options.
        threads: CPU threads; None leaves it to OpenVINO.

    Raises:
        TargetError: the engine's option ``inference_precision`` is unknown.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # Where weights alone are quantised OpenVINO would round activations to 8 bits too, unasked: 0.5 % of error.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": inference_precision(
            openvino_core(), source.options.get("inference_precision", "f32")
        ),
    }
    if source.options.get(WEIGHT_BITS, 0) > exact_weight_bits():
        log.warning(
            "%s computes in float32: products with its weights of 8 bits would saturate on this processor, which has "
            "no VNNI; an export on it, or with --reduce-range, is faster",
            source.spec.name,
        )
        settings[_MULTIPLY_BYTES] = "NO"
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
