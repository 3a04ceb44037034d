"""ONNX engines in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime

from sdc.engines.errors import TargetError
from sdc.engines.freed_memory import give_memory_back
from sdc.engines.processor import MOST_WEIGHT_BITS, WEIGHT_BITS, exact_weight_bits
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds
from sdc.engines.sessions.onnxruntime_arena import SHARED_ARENA
from sdc.engines.sessions.onnxruntime_regions import SHARED, regions_of
from sdc.engines.sessions.source import EngineSource

PROVIDERS = ["CPUExecutionProvider"]
RUN_FEW_TIMES = "run_few_times"
"""Option of an engine: load fast. Optimising a UNet takes longer than a few runs of it save, and packed weights are a
second copy."""
RUN_IN_ORDER = "run_in_order"
"""Option of an engine: nodes run in the order of the file, as far as it optimises nothing. By default it goes from each
output as deep as it can: where outputs read tensors throughout a network, all of these are held until the end."""
_ERRORS_ONLY = 3
_FLOAT32_LEVEL = "1"
"""Source: ONNX Runtime's MatMulNBits, accuracy_level: 1 computes in float32."""


class OnnxRuntimeSession:
    """An ONNX Runtime inference session with the CPU provider and no other."""

    def __init__(self, source: EngineSource, *, threads: int | None = None) -> None:
        self.spec = source.spec
        _check_weight_bits(source)
        self._weight_bytes = sum(file.stat().st_size for file in source.files)
        options = session_options(threads)
        # From the second run on it would hold one more block for all activations, and be no faster.
        options.enable_mem_pattern = False
        # A tensor's memory would be kept for a later one of its shape: in a UNet, from its way down to its way up.
        options.enable_mem_reuse = False
        if WEIGHT_BITS not in source.options and exact_weight_bits() < MOST_WEIGHT_BITS:
            # A graph that was not built for this target, such as a simulation of another: its products could saturate.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if source.options.get(RUN_FEW_TIMES):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        if source.options.get(RUN_IN_ORDER):
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        self._shares_arena = regions_of(self._weight_bytes) is SHARED and SHARED_ARENA.share(options)
        session = open_inference_session(source, options)
        check_tensors(source, session)
        self._give_back()  # constants as they were before they were packed
        self._session: onnxruntime.InferenceSession | None = session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)
        names = [tensor.name for tensor in self.spec.outputs]
        # On the CPU these read an array's memory in place and keep it alive.
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in held.arrays.items()}

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._session is not None, "the session is closed"
            given = held.complete(others)
            other_values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
            made = self._session.run_with_ort_values(names, values | other_values)
            results = {name: value.numpy() for name, value in zip(names, made, strict=True)}
            # No region could be given back while the caller has results that lie in it.
            return {name: array.copy() for name, array in results.items()} if self._shares_arena else results

        return run

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights; ONNX Runtime does not tell what activations take."""
        return self._weight_bytes

    def close(self) -> None:
        """Release the model; may be called twice."""
        if self._session is not None:
            self._session = None
            self._give_back()
        self._weight_bytes = 0

    def _give_back(self) -> None:
        """Let the system have what is free. An engine with an arena of its own leaves the shared one alone."""
        if self._shares_arena:
            SHARED_ARENA.give_back()
        else:
            give_memory_back()

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_weight_bits(source: EngineSource) -> None:
    """Refuse products of bytes that this processor would not sum exactly.

    ONNX Runtime's own way out, the option "session.x64quantprecision", ends with an error for weights with a scale per
    channel (1.31).

    Raises:
        TargetError: weights have too many bits.
    """
    if source.options.get(WEIGHT_BITS, 0) > exact_weight_bits():
        raise TargetError(
            f"cannot run {source.files[0]} here: products with weights of 8 bits saturate on x86 without VNNI",
            hint="export the bundle on this machine, or with --reduce-range; the target cpu computes it in float32",
        )


def open_inference_session(source: EngineSource, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load an engine on the CPU.

    Raises:
        BundleError: ONNX Runtime cannot read the files.
        TargetError: it would not run them on the CPU.
    """
    try:
        session = onnxruntime.InferenceSession(source.files[0], options, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise source.unreadable(error) from error
    # ONNX Runtime falls back to another provider with no more than a warning: make it an error.
    if session.get_providers() != PROVIDERS:
        raise source.unrunnable(f"expected the providers {PROVIDERS}, found {session.get_providers()}")
    return session


def check_tensors(source: EngineSource, session: onnxruntime.InferenceSession) -> None:
    """Compare the names of inputs and outputs with the interface.

    Raises:
        BundleError: they are others.
    """
    expected = {tensor.name for tensor in (*source.spec.inputs, *source.spec.outputs)}
    found = {node.name for node in (*session.get_inputs(), *session.get_outputs())}
    if expected != found:
        raise source.unreadable(f"expected tensors {sorted(expected)}, found {sorted(found)}")


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """How every engine is run; None leaves the number of CPU threads to ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.inter_op_num_threads = 1
    # Where weights alone are quantised it would round activations to 8 bits too (level 4): 0.5 % of error, unasked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT32_LEVEL)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
