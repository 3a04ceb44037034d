"""What this machine can build and run, and why not the rest. Needs none of the compiler's dependencies."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdc.engines.gpu import Gpu, find_gpus
from sdc.engines.kernels.build import is_built
from sdc.engines.kernels.library import missing_for_kernels
from sdc.engines.processor import exact_weight_bits
from sdc.engines.targets import BACKEND_MODULES, TARGETS, TENSORRT_RTX, Target, runnable

DISTRIBUTIONS = (
    "sdc", "numpy", "openvino", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "cuda-python", "torch",
    "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "polygraphy",
)  # fmt: skip
"""Distributions whose versions decide what works."""

EXPORT_MODULES = ("torch", "diffusers", "transformers", "safetensors", "peft", "onnx", "onnx_ir", "onnxscript")
"""What every export needs, whatever the target."""

CPU_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f", "avx512bw", "avx512vl"),
    "VNNI": ("avx512_vnni",),
    "bf16": ("avx512_bf16",),
    "AMX bf16": ("amx_bf16",),
    "AMX int8": ("amx_int8",),
}
"""Flags in Linux' /proc/cpuinfo that make up each feature. Source: Linux arch/x86/include/asm/cpufeatures.h."""


@dataclass(frozen=True)
class Processor:
    """The CPU.

    Attributes:
        usable_cpus: logical CPUs that this process may use.
        features: whether it has each of ``CPU_FEATURES``; None where the operating system does not tell.
    """

    name: str
    usable_cpus: int
    features: Mapping[str, bool] | None


@dataclass(frozen=True)
class TargetDiagnosis:
    """One target; the reasons are None where nothing is in the way."""

    name: str
    backend: str
    compute_capabilities: tuple[str, ...]
    devices: str
    cannot_build: str | None
    cannot_run: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All that `sdc doctor` found; `memory_bytes` is None where the operating system does not tell.

    Attributes:
        cpu_arithmetic: what fp16 and int8 bundles compute in on the target cpu.
        int8_weight_bits: what an export gives int8 weights for CPUs here; see `exact_weight_bits`.
        cpu_kernels_built: whether kernels of sdc's own are there already.
        no_cpu_kernels: why the target cpu runs without kernels of sdc's own; None where it has them or will build them.
        no_gpu: why there are no GPUs.
    """

    system: str
    python: str
    versions: Mapping[str, str | None]
    processor: Processor
    memory_bytes: int | None
    cpu_arithmetic: str | None
    int8_weight_bits: int
    cpu_kernels_built: bool
    no_cpu_kernels: str | None
    gpus: tuple[Gpu, ...]
    no_gpu: str | None
    targets: tuple[TargetDiagnosis, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine: nothing is changed, and no backend does any work."""
    gpus = find_gpus()
    return Diagnosis(
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: _version(name) for name in DISTRIBUTIONS},
        processor=processor(),
        memory_bytes=_memory_bytes(),
        cpu_arithmetic=_cpu_arithmetic(),
        int8_weight_bits=exact_weight_bits(),
        cpu_kernels_built=is_built(),
        no_cpu_kernels=missing_for_kernels(),
        gpus=() if isinstance(gpus, str) else gpus,
        no_gpu=gpus if isinstance(gpus, str) else None,
        targets=tuple(_diagnose_target(target) for target in TARGETS.values()),
    )


def _diagnose_target(target: Target) -> TargetDiagnosis:
    broken = _import_failure(BACKEND_MODULES[target.backend])
    return TargetDiagnosis(
        name=target.name,
        backend=target.backend,
        compute_capabilities=target.compute_capabilities,
        devices=target.devices,
        cannot_build=broken or _missing_for_export(),
        cannot_run=broken or runnable(target),
    )


def _import_failure(module: str) -> str | None:
    """Why a backend cannot be used; an installed one may still lack a library of the system."""
    extra = "tensorrt" if module == BACKEND_MODULES[TENSORRT_RTX] else "compile"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed: pip install 'sdc[{extra}]'"
    except (ImportError, OSError) as error:
        return f"the package {module} cannot be loaded: {error}"
    return None


def _missing_for_export() -> str | None:
    missing = [name for name in EXPORT_MODULES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'sdc[compile]'" if missing else None


def _cpu_arithmetic() -> str | None:
    """What float16 and int8 bundles compute their floating-point part in on the target cpu: "bf16" or "f32"."""
    if _import_failure("openvino") is not None:
        return None

    from sdc.engines.sessions.openvino import inference_precision
    from sdc.engines.sessions.openvino_core import openvino_core

    return inference_precision(openvino_core(), "auto")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> Processor:
    """That of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Processor(platform.processor() or platform.machine(), usable, None)
    return parse_cpuinfo(text, usable_cpus=usable)


def parse_cpuinfo(text: str, *, usable_cpus: int) -> Processor:
    """The processor that Linux' /proc/cpuinfo describes; its features are None on other architectures than x86."""
    fields = {}
    for line in reversed(text.splitlines()):  # of several processors the first counts
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags")
    features = None
    if flags is not None:
        present = set(flags.split())
        features = {name: present.issuperset(needed) for name, needed in CPU_FEATURES.items()}
    return Processor(fields.get("model name", platform.machine()), usable_cpus, features)


def _memory_bytes() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().total)
    return None
