"""Inputs and outputs of an ONNX Runtime session at addresses of a device that stay the same between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime

from sdc.engines.sessions.feeds import Shapes

_ALIGNMENT = 256
"""Bytes; what cudaMalloc gives, and kernels that read whole vectors may rely on."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}


def input_dtypes(session: onnxruntime.InferenceSession) -> dict[str, np.dtype[Any]]:
    """Element types of a session's inputs by name."""
    return {node.name: _DTYPES[node.type] for node in session.get_inputs()}


def without_graph() -> onnxruntime.RunOptions:
    """Options of a run that captures no CUDA graph, whether the session may or not."""
    return _for_graph(-1)


def _for_graph(number: int | None) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


class InputBlock:
    """Arrays side by side in one piece of a device's memory; all go there in one copy.

    Args:
        dtypes: element types by name. Arrays of another type are converted.
        shapes: shapes by name.
        device: ONNX Runtime's name, "cuda" or "cpu".
    """

    def __init__(self, dtypes: Mapping[str, np.dtype[Any]], shapes: Shapes, device: str) -> None:
        self._device = device
        self._shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            self._offsets[name] = size
            bytes_of_array = dtypes[name].itemsize * int(np.prod(shape))
            size += -(-bytes_of_array // _ALIGNMENT) * _ALIGNMENT
        self._staged = np.zeros(max(size, 1), np.uint8)
        self._arrays = {name: self._view(name, dtypes[name]) for name in shapes}
        self._memory = onnxruntime.OrtValue.ortvalue_from_shape_and_type(self._staged.shape, np.uint8, device, 0)

    def _view(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        return np.ndarray(self._shapes[name], dtype, self._staged.data, self._offsets[name])

    def assign(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy all arrays of the block."""
        for name, array in arrays.items():
            self._arrays[name][...] = array
        if self._arrays:
            self._memory.update_inplace(self._staged)

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Let a binding read its inputs here; the block must outlive it."""
        for name, array in self._arrays.items():
            address = self._memory.data_ptr() + self._offsets[name]
            binding.bind_input(name, self._device, 0, array.dtype.type, array.shape, address)


class BoundRun:
    """Runs of a session with inputs of the same shapes.

    Outputs are copied to the host. From the second run on they are written to memory of their own first, and the
    provider may replay the second run's kernels as a CUDA graph: addresses stay the same.

    Args:
        session: may have been opened with ``enable_cuda_graph``.
        outputs: names of all its outputs.
        held: shapes of the inputs that stay the same for several runs, by name.
        changing: of the other inputs.
        device: where inputs and outputs are.
        graph: number of the CUDA graph, at least 1 and not that of another `BoundRun` of the session; None to capture
            none.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        outputs: Iterable[str],
        held: Shapes,
        changing: Shapes,
        *,
        device: str,
        graph: int | None,
    ) -> None:
        dtypes = input_dtypes(session)
        self._session = session
        self._outputs = tuple(outputs)
        self._held = InputBlock(dtypes, held, device)
        self._changing = InputBlock(dtypes, changing, device)
        self._device = device
        self._graph = graph
        self._holder: object = None
        self._binding: onnxruntime.IOBinding | None = None
        self._results: list[onnxruntime.OrtValue] = []

    def __call__(
        self, holder: object, held: Mapping[str, np.ndarray], changing: Mapping[str, np.ndarray], *, shrink: bool
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            holder: whose `held` these are: they are copied only if the run before had another's.
            held: arrays of the shapes given to the constructor.
            changing: likewise.
            shrink: give the run's memory back after it. Not allowed once a graph of the session was captured: its
                kernels write to memory that is free between runs.
        """
        if self._holder is not holder:
            self._holder = None
            self._held.assign(held)
            self._holder = holder
        self._changing.assign(changing)
        found = self._run_first(shrink) if self._graph is None or not self._results else self._run_again()
        return dict(zip(self._outputs, found, strict=True))

    def _run_first(self, shrink: bool) -> list[np.ndarray]:
        """Without a graph; outputs go to the host, and tell what memory they need."""
        binding = self._new_binding()
        for name in self._outputs:
            binding.bind_output(name)
        options = without_graph()
        if shrink:
            arena = "gpu:0" if self._device == "cuda" else "cpu:0"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        self._session.run_with_iobinding(binding, options)
        found: list[np.ndarray] = binding.copy_outputs_to_cpu()
        if self._graph is not None:
            like = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            self._results = [like(array.shape, array.dtype, self._device, 0) for array in found]
        return found

    def _run_again(self) -> list[np.ndarray]:
        if self._binding is None:
            binding = self._new_binding()
            for name, value in zip(self._outputs, self._results, strict=True):
                binding.bind_ortvalue_output(name, value)
            self._binding = binding
        self._session.run_with_iobinding(self._binding, _for_graph(self._graph))
        found: list[np.ndarray] = self._binding.copy_outputs_to_cpu()
        return found

    def _new_binding(self) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        self._held.bind(binding)
        self._changing.bind(binding)
        return binding
