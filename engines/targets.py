"""What an engine is built for, and whether this machine can run it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from sdc.engines.errors import InputError
from sdc.engines.gpu import find_gpus

OPENVINO, ONNXRUNTIME, TENSORRT_RTX = "openvino", "onnxruntime", "tensorrt_rtx"
ONNXRUNTIME_CUDA = "onnxruntime_cuda"
"""ONNX Runtime with its CUDA provider, whose graphs and sessions are others than those for the CPU."""

BACKEND_MODULES = {
    OPENVINO: "openvino",
    ONNXRUNTIME: "onnxruntime",
    ONNXRUNTIME_CUDA: "onnxruntime",
    TENSORRT_RTX: "tensorrt_rtx",
}
"""The package that each backend is."""

COMPUTE_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPU generations that TensorRT for RTX 1.7 builds for (`trt.ComputeCapability`)."""

LATER_TARGETS = ("openvino-cpu", "tensorrt")


@dataclass(frozen=True)
class Target:
    """What an engine is for.

    Attributes:
        name: its name on the command line, in the manifest, and of the `.plan` file.
        backend: what builds and runs it: "openvino", "onnxruntime", "onnxruntime_cuda" or "tensorrt_rtx".
        compute_capabilities: GPU generations that one plan serves, e.g. "sm86"; empty where none is named.
    """

    name: str
    backend: str
    compute_capabilities: tuple[str, ...] = ()

    @property
    def devices(self) -> str:
        """What it runs on, in words."""
        anywhere = "any NVIDIA GPU" if self.backend == ONNXRUNTIME_CUDA else "the CPU"
        return ", ".join(self.compute_capabilities) or anywhere


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", OPENVINO),
        Target("ort-cpu", ONNXRUNTIME),
        Target("ort-cuda", ONNXRUNTIME_CUDA),
        Target("rtx", TENSORRT_RTX, ("sm86", "sm89", "sm120")),
        *(Target(name, TENSORRT_RTX, (name,)) for name in COMPUTE_CAPABILITIES),
    )
}
"""Targets by name; several GPU generations can also be joined in one plan: "sm86+sm89"."""


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets from a comma-separated list such as ``cpu,rtx`` or ``sm75+sm86,ort-cpu``, without repetitions, in order.

    Raises:
        InputError: the list is empty or names a target that does not exist.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no target was given", hint=f"choose from {_choices()}")
    return tuple(dict.fromkeys(_parse_target(name) for name in names))


def _parse_target(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]
    parts = set(name.split("+"))
    if "+" in name and parts <= set(COMPUTE_CAPABILITIES):
        capabilities = tuple(each for each in COMPUTE_CAPABILITIES if each in parts)
        return Target("+".join(capabilities), TENSORRT_RTX, capabilities)
    if name in LATER_TARGETS:
        raise InputError(f"the target {name!r} is not supported in this version", hint=f"choose from {_choices()}")
    of_a_gpu = (
        "TensorRT for RTX has no such GPU, ort-cuda runs on any of NVIDIA's; " if re.fullmatch(r"sm\d+", name) else ""
    )
    raise InputError(f"unknown target {name!r}", hint=f"{of_a_gpu}choose from {_choices()}")


def _choices() -> str:
    return f"{', '.join(TARGETS)}, or several GPUs in one plan such as sm86+sm89"


def runnable(target: Target) -> str | None:
    """Why this machine cannot run engines of `target`; None if it can."""
    if target.backend == OPENVINO:
        return _missing("openvino", "pip install openvino")
    if target.backend == ONNXRUNTIME:
        return _missing("onnxruntime", "pip install onnxruntime")
    if target.backend == ONNXRUNTIME_CUDA:
        return _onnxruntime_cuda_reason()
    if target.backend == TENSORRT_RTX:
        return _tensorrt_reason(target)
    return f"this version of sdc has no backend {target.backend!r}"


def _missing(module: str, remedy: str) -> str | None:
    found = importlib.util.find_spec(module.split(".")[0]) is not None and importlib.util.find_spec(module) is not None
    return None if found else f"the package {module} is not installed ({remedy})"


def _onnxruntime_cuda_reason() -> str | None:
    missing = _missing("onnxruntime", "pip install onnxruntime-gpu")
    gpus = find_gpus()
    if missing or isinstance(gpus, str):
        return missing or str(gpus)
    from sdc.engines.sessions.onnxruntime_cuda import why_no_cuda  # it loads ONNX Runtime

    return why_no_cuda(gpus[0].driver_cuda)


def _tensorrt_reason(target: Target) -> str | None:
    remedy = "pip install 'sdc[tensorrt]'"
    missing = _missing("tensorrt_rtx", remedy) or _missing("cuda.bindings", remedy)
    if missing:
        return missing
    gpus = find_gpus()
    if isinstance(gpus, str):
        return gpus
    if any(gpu.compute_capability in target.compute_capabilities for gpu in gpus):
        return None
    return f"it was built for {', '.join(target.compute_capabilities)} and this machine has {', '.join(map(str, gpus))}"
