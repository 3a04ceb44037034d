"""ONNX engines in ONNX Runtime, on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime

from sdc.engines.errors import TargetError
from sdc.engines.gpu import find_gpus
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds
from sdc.engines.sessions.onnxruntime import check_tensors, session_options
from sdc.engines.sessions.source import EngineSource, one_line

PROVIDER = "CUDAExecutionProvider"
_CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
_ERRORS_OF_A_GPU = re.compile(r"CUDA (failure|error)|CUDNN|CUBLAS|[Ff]ailed to allocate memory|out of memory")
ALLOW_TF32 = "allow_tf32"
"""Option of an engine: float32 convolutions and products may round their operands to 10 bits, as float16 has.

Without it ONNX Runtime asks cuDNN for no kernel that uses tensor cores, whatever the type, finds none for float16, and
takes another path with an error in the log for each convolution. A float32 engine computes in float32.
"""


class OnnxRuntimeCudaSession:
    """An ONNX Runtime inference session with the CUDA provider, whose inputs are kept on the GPU."""

    def __init__(self, source: EngineSource) -> None:
        self.spec = source.spec
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
        with self._explaining_errors():
            values = {name: _to_device(array) for name, array in held.arrays.items()}

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._session is not None, "the session is closed"
            arrays = held.complete(others)
            with self._explaining_errors():
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

    @contextlib.contextmanager
    def _explaining_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise TargetError(
                f"ONNX Runtime failed to run {self.spec.name} on the GPU: {one_line(error)}",
                hint="if memory is short, choose a smaller batch or size, or close other programs that use the GPU",
            ) from error

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
        TargetError: there is no GPU that it can use, or the engine does not fit on it.
    """
    gpus = find_gpus()
    reason = gpus if isinstance(gpus, str) else why_no_cuda(gpus[0].driver_cuda)
    if reason is not None:
        raise source.unrunnable(reason)
    provider_options = {
        "use_tf32": "1" if source.options.get(ALLOW_TF32) else "0",
        "arena_extend_strategy": "kSameAsRequested",  # memory grows by what is asked for, not to a power of two
    }
    try:
        # Without the fallback: it is to the CPU, with a message on the standard output.
        session = onnxruntime.InferenceSession(
            source.files[0], options, providers=[(PROVIDER, provider_options)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        of_the_gpu = _ERRORS_OF_A_GPU.search(str(error))
        raise (source.unrunnable if of_the_gpu else source.unreadable)(error) from error
    if session.get_providers()[0] != PROVIDER:
        raise source.unrunnable(f"expected the provider {PROVIDER}, found {session.get_providers()}")
    return session


@functools.cache
def why_no_cuda(driver_cuda: str) -> str | None:
    """Why ONNX Runtime cannot use this machine's GPU; None if it can. Asked once: it loads CUDA and cuDNN.

    They are taken from the packages nvidia-*, else from the system. cuDNN is asked for by itself: ONNX Runtime loads it
    only when a convolution runs.

    Args:
        driver_cuda: the newest CUDA that the driver runs, e.g. "13.0".
    """
    if PROVIDER not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} was built without CUDA: install onnxruntime-gpu"
    wanted = onnxruntime.cuda_version or ""
    if _major(driver_cuda) < _major(wanted):
        return f"the NVIDIA driver runs CUDA {driver_cuda}, ONNX Runtime needs {wanted}: update the driver"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls(directory="")
    try:
        ctypes.CDLL(_CUDNN)
        _to_device(np.zeros(1, np.float32))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        said = " ".join([*printed.getvalue().splitlines()[:1], str(error)])
        return f"CUDA {wanted} with cuDNN 9 cannot be used: pip install 'onnxruntime-gpu[cuda,cudnn]'; {said}"
    return None


def _major(version: str) -> int:
    number = version.split(".")[0]
    return int(number) if number.isdigit() else 0
