"""ONNX engines in ONNX Runtime, on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from sdc.engines.gpu import find_gpus
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds
from sdc.engines.sessions.onnxruntime import check_tensors, session_options
from sdc.engines.sessions.source import EngineSource

PROVIDER = "CUDAExecutionProvider"
ALLOW_TF32 = "allow_tf32"
"""Option of an engine: float32 convolutions and products may round their operands to 10 bits, as float16 has.

Without it ONNX Runtime asks cuDNN for no kernel that uses tensor cores, whatever the type, finds none for float16, and
takes another path with an error in the log for each convolution. A float32 engine computes in float32.
"""


class OnnxRuntimeCudaSession:
    """An ONNX Runtime inference session with the CUDA provider, whose inputs are kept on the GPU."""

    def __init__(self, source: EngineSource) -> None:
        self.spec = source.spec
        gpus = find_gpus()
        if isinstance(gpus, str):
            raise source.unrunnable(gpus)
        session = open_inference_session(source, session_options(None))
        check_tensors(source, session)
        self._session: onnxruntime.InferenceSession | None = session
        self._on_device = {tensor.name: _DeviceArray() for tensor in source.spec.inputs}
        self._weight_bytes = sum(file.stat().st_size for file in source.files)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds, which are copied to the GPU now; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)
        values = {name: _to_device(array) for name, array in held.arrays.items()}

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._session is not None, "the session is closed"
            arrays = held.complete(others)
            given = {name: self._on_device[name].assign(array) for name, array in arrays.items()}
            binding = self._session.io_binding()
            for name, value in {**values, **given}.items():
                binding.bind_ortvalue_input(name, value)
            for tensor in self.spec.outputs:
                binding.bind_output(tensor.name)  # in the host's memory: the run ends when the copy has
            self._session.run_with_iobinding(binding)
            results = binding.copy_outputs_to_cpu()
            return {tensor.name: result for tensor, result in zip(self.spec.outputs, results, strict=True)}

        return run

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights; ONNX Runtime does not tell what activations take."""
        return self._weight_bytes

    def close(self) -> None:
        """Release the model; may be called twice."""
        self._session = None
        self._on_device = {}
        self._weight_bytes = 0

    def __enter__(self) -> OnnxRuntimeCudaSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _DeviceArray:
    """Memory on the GPU for one input, made anew when its shape changes."""

    def __init__(self) -> None:
        self._value: Any = None
        self._shape: tuple[int, ...] | None = None

    def assign(self, array: np.ndarray) -> Any:
        """Copy an array there."""
        if array.shape == self._shape:
            self._value.update_inplace(array)
        else:
            self._value, self._shape = _to_device(array), array.shape
        return self._value


def _to_device(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)


def open_inference_session(source: EngineSource, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load an engine on the first GPU; ONNX Runtime itself puts the arithmetic of shapes on the CPU.

    Raises:
        BundleError: ONNX Runtime cannot read the files.
        TargetError: its CUDA provider cannot be loaded: CUDA or cuDNN is missing, or it was built without.
    """
    _require_cuda(source)
    provider_options = {
        "use_tf32": "1" if source.options.get(ALLOW_TF32) else "0",
        "arena_extend_strategy": "kSameAsRequested",  # memory grows by what is asked for, not to a power of two
    }
    try:
        session = onnxruntime.InferenceSession(source.files[0], options, providers=[(PROVIDER, provider_options)])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise source.unreadable(error) from error
    # ONNX Runtime falls back to another provider with no more than a warning: make it an error.
    if session.get_providers()[0] != PROVIDER:
        raise source.unrunnable(f"expected the provider {PROVIDER}, found {session.get_providers()}")
    return session


def _require_cuda(source: EngineSource) -> None:
    """Load CUDA and cuDNN, of the packages nvidia-* or else of the system, and put a number on the GPU."""
    if PROVIDER not in onnxruntime.get_available_providers():
        raise source.unrunnable(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: install onnxruntime-gpu")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls(directory="")
    try:
        _to_device(np.zeros(1, np.float32))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise source.unrunnable(
            f"ONNX Runtime could not load CUDA {onnxruntime.cuda_version} with cuDNN: "
            f"pip install 'onnxruntime-gpu[cuda,cudnn]'; {printed.getvalue() or error}"
        ) from error
