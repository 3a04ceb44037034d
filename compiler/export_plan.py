"""What an export consists of, and the keys under which its stages are cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from sdc.compiler.calibration.options import DEFAULT_CALIBRATION, CalibrationOptions
from sdc.compiler.stages import Opened, Source
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.workshop.cache import digest_of, digest_sources, versions_of
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import ONNXRUNTIME, OPENVINO, TENSORRT_RTX, Target

QUANTISED = ("unet",)
"""Components that "int8" quantises; the others are exported as in "fp16"."""

HOISTED_FROM = ("unet",)
"""Components that run in a loop: what does not change in it is taken out."""

EXPORT_SOURCES = ("sdc.compiler.trace", "sdc.compiler.load")
EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnx", "peft")
CALIBRATE_SOURCES = ("sdc.compiler.calibration", "sdc.compiler.stages", "sdc.passes", "sdc.engines")
CALIBRATE_TOOLS = ("onnxruntime-gpu", "onnxruntime", "numpy", "onnx-ir", "onnxscript")
BUILD_SOURCES = (
    "sdc.passes",
    "sdc.compiler.build",
    "sdc.compiler.component",
    "sdc.compiler.hoisting",
    "sdc.compiler.stages",
    "sdc.engines.specs",
)
BUILD_TOOLS = ("onnx-ir", "onnxscript", "onnx")
BACKEND_TOOLS = {
    OPENVINO: ("openvino",),
    ONNXRUNTIME: ("onnxruntime-gpu", "onnxruntime"),
    TENSORRT_RTX: ("tensorrt-rtx-cu13",),
}


@dataclass(frozen=True)
class ExportRequest:
    """What the user asks for.

    Attributes:
        source: the checkpoint.
        precision: one of `PRECISIONS`.
        targets: what engines are built for; at least one.
        out: the bundle's folder.
        fuse: whether operators are fused.
        hoist: whether work that is the same at each step leaves the UNet; else it has the interface that others know.
        calibration: how "int8" is calibrated.
    """

    source: Source
    precision: str
    targets: tuple[Target, ...]
    out: Path
    fuse: bool = True
    hoist: bool = True
    calibration: CalibrationOptions = DEFAULT_CALIBRATION


@dataclass(frozen=True)
class ExportPlan:
    """The stages of an export, by the digests of all that they depend on.

    Attributes:
        specs: interfaces of the components, before anything is hoisted out of them.
        export_keys: by component.
        calibration_key: None unless something is quantised.
        build_keys: by component and name of the target.
        prompts: of the calibration; None for the model's own.
    """

    specs: Mapping[str, ComponentSpec]
    export_keys: Mapping[str, str]
    calibration_key: str | None
    build_keys: Mapping[tuple[str, str], str]
    prompts: tuple[str, ...] | None


def plan_export(request: ExportRequest, opened: Opened) -> ExportPlan:
    """Work out the keys; nothing is computed yet.

    Raises:
        InputError: the networks do not fit together, or the file of prompts cannot be used.
    """
    specs = {name: component_spec(name, opened.configs) for name in COMPONENTS}
    exporting = [digest_sources(EXPORT_SOURCES), versions_of(EXPORT_TOOLS)]
    export_keys = {
        name: digest_of(["export", *exporting, opened.digests[name], specs[name].to_json()]) for name in COMPONENTS
    }
    file = request.calibration.prompts_file
    prompts = None if file is None else read_prompts(file)
    calibration_key = None
    if request.precision == "int8":
        calibration_key = _calibration_key(request, opened, export_keys, prompts)
    building = [digest_sources(BUILD_SOURCES), versions_of(BUILD_TOOLS), request.fuse]
    build_keys = {
        (name, target.name): digest_of(
            [
                "build",
                *building,
                export_keys[name],
                component_precision(name, request.precision),
                remainder(target),
                [calibration_key, *_range_options(request.calibration, target)] if name in QUANTISED else None,
                request.hoist and name in HOISTED_FROM,
                [target.name, target.backend, *target.compute_capabilities],
                versions_of(BACKEND_TOOLS[target.backend]),
            ]
        )
        for name in COMPONENTS
        for target in request.targets
    }
    return ExportPlan(specs, export_keys, calibration_key, build_keys, prompts)


def component_precision(component: str, precision: str) -> str:
    """The precision of one component in a bundle."""
    return "fp16" if precision == "int8" and component not in QUANTISED else precision


def remainder(target: Target) -> str:
    """What "int8" leaves in floating point; ONNX Runtime has no float16 kernels for CPUs and would cast to and fro."""
    return "fp32" if target.backend == ONNXRUNTIME else "fp16"


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines are left out.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompt", hint="write one prompt a line")
    return prompts


def tool_versions(request: ExportRequest) -> dict[str, str]:
    """Versions of everything that took part, for the report."""
    tools = {*EXPORT_TOOLS, *BUILD_TOOLS, "numpy"}.union(*(BACKEND_TOOLS[each.backend] for each in request.targets))
    installed = {name: found for name, found in versions_of(sorted(tools)).items() if found}
    return {"sdc": version("sdc"), **installed}


def _calibration_key(
    request: ExportRequest, opened: Opened, export_keys: Mapping[str, str], prompts: tuple[str, ...] | None
) -> str:
    return digest_of(
        [
            "calibrate",
            digest_sources(CALIBRATE_SOURCES),
            versions_of(CALIBRATE_TOOLS),
            export_keys["unet"],
            export_keys["text_encoder"],
            {name: digest_of(content.decode("latin-1")) for name, content in opened.files.items()},
            request.fuse,
            request.calibration.alpha,
            opened.entry.name if prompts is None else prompts,
            None if request.calibration.table_file is None else _file_digest(request.calibration.table_file),
        ]
    )


def _range_options(options: CalibrationOptions, target: Target) -> list[str | bool]:
    """What decides the integers beside the calibration itself."""
    return [options.rule_for(target).label, options.correct_bias]


def _file_digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the calibration {path}: {error.strerror}") from error
