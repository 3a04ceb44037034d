"""What an export consists of, and the keys under which its stages are cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdc.compiler.calibration.options import DEFAULT_CALIBRATION, CalibrationOptions
from sdc.compiler.doctor import processor
from sdc.compiler.precision.budget import JUDGE_PATH, JUDGE_SOURCES, Measure
from sdc.compiler.precision.capabilities import in_float32, runs_here
from sdc.compiler.precision.planning import AUTO, PrecisionRequest
from sdc.compiler.stages import Opened, Source
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.workshop.cache import digest_of, digest_sources, versions_of
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX, Target
from sdc.passes.pipeline import MIXED
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.plan import PrecisionPlan
from sdc.passes.precision.plan_file import text_from_plan
from sdc.passes.precision.range_rules import RangeRule

QUANTISED = ("unet",)
"""Components whose layers have precisions of their own; the others are exported in the default of the plan."""

HOISTED_FROM = ("unet",)
"""Components that run in a loop: what does not change in it is taken out, and what changes little may be cached."""

EXPORT_SOURCES = ("sdc.compiler.trace", "sdc.compiler.load", "sdc.compiler.build.built")
EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnx", "peft")
CALIBRATE_SOURCES = (
    "sdc.compiler.calibration",
    "sdc.compiler.precision",
    "sdc.compiler.half_stage",
    "sdc.compiler.calibration_stage",
    "sdc.compiler.automatic_stage",
    "sdc.compiler.compare.outputs",
    "sdc.compiler.evaluate.metrics",
    "sdc.compiler.stages",
    "sdc.passes",
    "sdc.engines",
)
CALIBRATE_TOOLS = ("onnxruntime-gpu", "onnxruntime", "numpy", "onnx-ir", "onnxscript")
BUILD_SOURCES = (
    "sdc.passes",
    "sdc.compiler.build",
    "sdc.compiler.precision",
    "sdc.compiler.component",
    "sdc.compiler.deepcache",
    "sdc.compiler.hoisting",
    "sdc.compiler.inner_sizes",
    "sdc.compiler.memory.graph_json",
    "sdc.compiler.sharding",
    "sdc.compiler.stages",
    "sdc.engines.specs",
)
BUILD_TOOLS = ("onnx-ir", "onnxscript", "onnx")
BACKEND_TOOLS = {
    OPENVINO: ("openvino",),
    ONNXRUNTIME: ("onnxruntime-gpu", "onnxruntime"),
    ONNXRUNTIME_CUDA: ("onnxruntime-gpu", "onnxruntime"),
    TENSORRT_RTX: ("tensorrt-rtx-cu13",),
}


@dataclass(frozen=True)
class ExportRequest:
    """What the user asks for.

    Attributes:
        source: the checkpoint.
        precision: of its layers.
        targets: what engines are built for; at least one.
        out: the bundle's folder.
        fuse: whether operators are fused.
        hoist: whether work that is the same at each step leaves the UNet; else it has the interface that others know.
        calibration: how "int8" is calibrated.
        deepcache: depth of the skip connection at which DeepCache's shallow UNet is cut; None for no such engine.
        shards: number of engines that the UNet is cut into, which run one after another; None leaves it whole.
        other_weights: whether the calibration table and the plan may be those of the same layers with other weights.
        base_digests: by component, of the checkpoint without LoRAs; another one is refused. None takes any.
        prompts: to draw with where no file of prompts is given; None for the model's own.
        memory_limit_bytes: of what all processes hold together; a stage that needs more is ended. It changes no result.
            None for no limit.
    """

    source: Source
    precision: PrecisionRequest
    targets: tuple[Target, ...]
    out: Path
    fuse: bool = True
    hoist: bool = True
    calibration: CalibrationOptions = DEFAULT_CALIBRATION
    deepcache: int | None = None
    shards: int | None = None
    other_weights: bool = False
    base_digests: Mapping[str, str] | None = None
    prompts: tuple[str, ...] | None = None
    memory_limit_bytes: int | None = None


@dataclass(frozen=True)
class ExportPlan:
    """The stages of an export, by the digests of all that they depend on.

    Attributes:
        specs: interfaces of the components, before anything is hoisted out of them.
        export_keys: by component; likewise `base_export_keys`, of the checkpoint without LoRAs.
        calibration_key: None unless something is quantised.
        automatic_key: of the choice of precisions; None where the user has made it.
        half_key: of the check of float16; None where nothing is in float16.
        build_keys: by component and name of the target.
        prompts: of the calibration; None for the model's own.
    """

    specs: Mapping[str, ComponentSpec]
    export_keys: Mapping[str, str]
    base_export_keys: Mapping[str, str]
    calibration_key: str | None
    automatic_key: str | None
    half_key: str | None
    build_keys: Mapping[tuple[str, str], str]
    prompts: tuple[str, ...] | None


def plan_export(request: ExportRequest, opened: Opened, overflows: Mapping[str, Any] | None = None) -> ExportPlan:
    """Work out the keys; nothing is computed yet.

    Those of engines are final once an automatic plan is chosen and in the request, and float16 is checked.

    Args:
        request: what to export.
        opened: the checkpoint.
        overflows: result of the stage `check-fp16`; None if it is not known yet, or not asked for.

    Raises:
        InputError: the networks do not fit together, or the file of prompts cannot be used.
    """
    specs = {name: component_spec(name, opened.configs) for name in COMPONENTS}
    exporting = [digest_sources(EXPORT_SOURCES), versions_of(EXPORT_TOOLS)]
    export_keys, base_export_keys = (
        {name: digest_of(["export", *exporting, digests[name], specs[name].to_json()]) for name in COMPONENTS}
        for digests in (opened.digests, opened.base_digests)
    )
    prompts = prompts_of(request)
    calibration_key = None
    # What is found before precisions are chosen does not depend on the choice.
    asked = replace(request.precision, plan=None) if request.precision.name == AUTO else request.precision
    if asked.calibrates:
        graphs = [export_keys["unet"], export_keys["text_encoder"]]
        chosen = request.calibration
        drawn = [str(each) for each in (chosen.steps, chosen.size_px, chosen.timesteps)]
        calibration_key = _drawing_key("calibrate", request, opened, [*graphs, *drawn], prompts)
    building = [digest_sources(BUILD_SOURCES), versions_of(BUILD_TOOLS), request.fuse]
    half_key = None
    if Format.FP16 in asked.formats():
        half_key = _drawing_key("check-fp16", request, opened, [export_keys[name] for name in COMPONENTS], prompts)
    automatic_key = None
    if (budget := request.precision.budget) is not None:
        budget.check_model(opened.entry.name)
        judged = [digest_sources(JUDGE_SOURCES), _file_digest(JUDGE_PATH)] if budget.measure is Measure.FRECHET else []
        here = processor()
        ranges = [_range_options(request.calibration, target) for target in request.targets]
        automatic_key = digest_of(
            [
                *("plan", calibration_key, half_key, budget.measure, str(budget.limit), automatic_defaults(request)),
                *judged,
                *(ranges, *building, request.hoist),
                *(export_keys[name] for name in COMPONENTS),
                *((here.name, here.usable_cpus) if all(map(runs_here, request.targets)) else ()),
                *((target.name, versions_of(BACKEND_TOOLS[target.backend])) for target in request.targets),
            ]
        )
    build_keys = {
        (name, target.name): digest_of(
            [
                "build",
                *building,
                export_keys[name],
                component_precision(name, request.precision, target),
                _plan_text(name, request.precision),
                in_float32(target),
                [calibration_key, *_range_options(request.calibration, target)] if name in QUANTISED else None,
                automatic_key if name in QUANTISED else None,
                half_key if overflows is None else ["overflows", digest_of(overflows.get(name))],
                request.hoist and name in HOISTED_FROM,
                *(("deepcache", depth) if (depth := component_depth(name, request)) is not None else ()),
                *(("shards", count) if (count := component_shards(name, request)) is not None else ()),
                [target.name, target.backend, *target.compute_capabilities],
                versions_of(BACKEND_TOOLS[target.backend]),
            ]
        )
        for name in COMPONENTS
        for target in request.targets
    }
    return ExportPlan(
        specs, export_keys, base_export_keys, calibration_key, automatic_key, half_key, build_keys, prompts
    )


def component_precision(component: str, precision: PrecisionRequest, target: Target) -> str:
    """The precision of one component in a bundle.

    What "int8" does not quantise is stored in 16 bits. For OpenVINO it is bfloat16, which it computes in where it can:
    float16 constants it expands to float32 at each start, and keeps both.
    """
    if component not in QUANTISED:
        in_bfloat16 = precision.name == Format.INT8.value and target.backend == OPENVINO
        return Format.BF16.value if in_bfloat16 else precision.default.value
    return MIXED if precision.name == AUTO else precision.name


def component_depth(component: str, request: ExportRequest) -> int | None:
    """Where DeepCache cuts one component, if it does."""
    return request.deepcache if component in HOISTED_FROM else None


def component_shards(component: str, request: ExportRequest) -> int | None:
    """How many engines one component is cut into; None leaves it whole."""
    return request.shards if component in HOISTED_FROM else None


def component_plan(component: str, precision: PrecisionRequest) -> PrecisionPlan | None:
    """The plan of one component, if one was given."""
    return precision.plan if component in QUANTISED else None


def _plan_text(component: str, precision: PrecisionRequest) -> str | None:
    plan = component_plan(component, precision)
    return None if plan is None else text_from_plan(plan)


def automatic_defaults(request: ExportRequest) -> tuple[Format, ...]:
    """Floating-point types for what automatic precisions do not quantise, the fastest first."""
    if all(map(in_float32, request.targets)):
        return (Format.FP32,)
    exact = (Format.FP32,) if all(map(runs_here, request.targets)) else ()
    return (Format.FP16, *exact)


def automatic_rule(request: ExportRequest) -> RangeRule:
    """How ranges are found where no target is meant: as for the one that allows least."""
    rules = [request.calibration.rule_for(target) for target in request.targets]
    return replace(next((rule for rule in rules if rule.symmetric), rules[0]), results=False)


def formats_on(target: Target, precision: PrecisionRequest) -> frozenset[Format]:
    """What the engines of a target hold: what is asked for, but float32 where a quantised precision says 16 bits."""
    formats = precision.formats()
    substituted = in_float32(target) and not formats <= FLOATING
    return formats - (FLOATING - {Format.FP32}) | {Format.FP32} if substituted else formats


def prompts_of(request: ExportRequest) -> tuple[str, ...] | None:
    """What calibration and the check of float16 draw; None for the model's own.

    Raises:
        InputError: the file of prompts cannot be used.
    """
    file = request.calibration.prompts_file
    return request.prompts if file is None else read_prompts(file)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines are left out.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
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


def _drawing_key(
    stage: str, request: ExportRequest, opened: Opened, graphs: list[str], prompts: tuple[str, ...] | None
) -> str:
    """The key of a stage that draws pictures with some of the exported graphs."""
    return digest_of(
        [
            stage,
            digest_sources(CALIBRATE_SOURCES),
            versions_of(CALIBRATE_TOOLS),
            *graphs,
            {name: digest_of(content.decode("latin-1")) for name, content in opened.files.items()},
            request.fuse,
            None if request.calibration.smoothing is None else request.calibration.smoothing.label,
            opened.entry.name if prompts is None else prompts,
            None if request.calibration.table_file is None else _file_digest(request.calibration.table_file),
        ]
    )


def _range_options(options: CalibrationOptions, target: Target) -> list[str | bool | int]:
    """What decides the integers beside the calibration itself."""
    rule = options.rule_for(target)
    return [rule.label, options.correct_bias, rule.weight_bits]


def _file_digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
