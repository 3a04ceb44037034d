"""ONNX engines in ONNX Runtime, on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import itertools
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime

from sdc.engines.errors import TargetError
from sdc.engines.gpu import find_gpus
from sdc.engines.session import Run
from sdc.engines.sessions.feeds import HeldFeeds, Shapes, shapes_of
from sdc.engines.sessions.onnxruntime import check_tensors, session_options
from sdc.engines.sessions.onnxruntime_binding import BoundRun
from sdc.engines.sessions.source import EngineSource, one_line

log = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
_CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
_ERRORS_OF_A_GPU = re.compile(r"CUDA (failure|error)|CUDNN|CUBLAS|[Ff]ailed to allocate memory|out of memory")
_REFUSED_GRAPH = re.compile(r"cannot use the graph capture feature")
_MOST_SHAPES = 8
"""Combinations of shapes whose inputs and outputs are kept. ONNX Runtime itself forgets no CUDA graph of a session."""
CUDA_GRAPH = "cuda_graph"
"""Option of an engine: it is run many times with the same shapes."""
ALLOW_TF32 = "allow_tf32"
"""Option of an engine: float32 convolutions and products may round their operands to 10 bits, as float16 has.

Without it ONNX Runtime asks cuDNN for no kernel that uses tensor cores, whatever the type, finds none for float16, and
takes another path with an error in the log for each convolution. A float32 engine computes in float32.
"""


class OnnxRuntimeCudaSession:
    """An ONNX Runtime inference session with the CUDA provider.

    An engine that is built for CUDA graphs replays one for each combination of shapes that `hold` is used with: the
    kernels of a run are launched at once. Its first run, which tries out kernels, gives its memory back; other engines,
    which run once or a few times for a picture, always do.
    """

    def __init__(self, source: EngineSource) -> None:
        self.spec = source.spec
        session, self._has_graphs = open_inference_session(source, session_options(None))
        check_tensors(source, session)
        self._session: onnxruntime.InferenceSession | None = session
        self._bound: dict[tuple[Any, ...], BoundRun] = {}
        self._graphs = itertools.count(1)
        self._runs_often = bool(source.options.get(CUDA_GRAPH))
        self._shrinks = True
        self._weight_bytes = sum(file.stat().st_size for file in source.files)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self._runner(feeds={}, graph=False)(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds, which are copied to the GPU once; see `Session.hold`."""
        return self._runner(feeds, graph=self._has_graphs)

    def _runner(self, feeds: Mapping[str, np.ndarray], *, graph: bool) -> Run:
        held = HeldFeeds(self.spec, feeds)

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._session is not None, "the session is closed"
            arrays = held.complete(others)
            with self._explaining_errors():
                bound = self._bound_run(shapes_of(held.arrays), shapes_of(arrays), graph=graph)
                results = bound(held, held.arrays, arrays, shrink=self._shrinks)
            # The next run may capture a graph, whose memory has to stay.
            self._shrinks = self._shrinks and not self._runs_often
            return results

        return run

    def _bound_run(self, held: Shapes, changing: Shapes, *, graph: bool) -> BoundRun:
        """The runs of these shapes; those that were not used for longest are forgotten."""
        assert self._session is not None
        key = (tuple(held.items()), tuple(changing.items()), graph)
        bound = self._bound.pop(key, None)
        if bound is None:
            while len(self._bound) >= _MOST_SHAPES:
                del self._bound[next(iter(self._bound))]
            number = next(self._graphs) if graph else None
            outputs = [tensor.name for tensor in self.spec.outputs]
            bound = BoundRun(self._session, outputs, held, changing, device=DEVICE, graph=number)
        self._bound[key] = bound
        return bound

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
        self._bound = {}
        self._session = None
        self._weight_bytes = 0

    def __enter__(self) -> OnnxRuntimeCudaSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_inference_session(
    source: EngineSource, options: onnxruntime.SessionOptions
) -> tuple[onnxruntime.InferenceSession, bool]:
    """Load an engine on the first GPU; ONNX Runtime itself puts the arithmetic of shapes on the CPU.

    Returns:
        The session, and whether it captures CUDA graphs. ONNX Runtime refuses to where it has put more than the
        arithmetic of shapes on the CPU; such an engine runs without.

    Raises:
        BundleError: ONNX Runtime cannot read the files.
        TargetError: there is no GPU that it can use, or the engine does not fit on it.
    """
    gpus = find_gpus()
    reason = gpus if isinstance(gpus, str) else why_no_cuda(gpus[0].driver_cuda)
    if reason is not None:
        raise source.unrunnable(reason)
    graphs = bool(source.options.get(CUDA_GRAPH))
    try:
        try:
            session = _create(source, options, graphs=graphs)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            if not graphs or not _REFUSED_GRAPH.search(str(error)):
                raise
            log.debug("%s runs without a CUDA graph: %s", source.spec.name, one_line(error))
            graphs = False
            session = _create(source, options, graphs=False)
    except Exception as error:
        of_the_gpu = _ERRORS_OF_A_GPU.search(str(error))
        raise (source.unrunnable if of_the_gpu else source.unreadable)(error) from error
    if session.get_providers()[0] != PROVIDER:
        raise source.unrunnable(f"expected the provider {PROVIDER}, found {session.get_providers()}")
    return session, graphs


def _create(source: EngineSource, options: onnxruntime.SessionOptions, *, graphs: bool) -> onnxruntime.InferenceSession:
    provider_options = {
        "use_tf32": "1" if source.options.get(ALLOW_TF32) else "0",
        "arena_extend_strategy": "kSameAsRequested",  # memory grows by what is asked for, not to a power of two
        "enable_cuda_graph": "1" if graphs else "0",
    }
    # Without the fallback: it is to the CPU, with a message on the standard output.
    return onnxruntime.InferenceSession(
        source.files[0], options, providers=[(PROVIDER, provider_options)], enable_fallback=0
    )


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
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), DEVICE, 0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        said = " ".join([*printed.getvalue().splitlines()[:1], str(error)])
        return f"CUDA {wanted} with cuDNN 9 cannot be used: pip install 'onnxruntime-gpu[cuda,cudnn]'; {said}"
    return None


def _major(version: str) -> int:
    number = version.split(".")[0]
    return int(number) if number.isdigit() else 0
