"""The stages of an export, as they run in a worker process: each reads folders and fills one."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir

from sdc.compiler.bundle.small_files import small_files
from sdc.compiler.bundle.writer import json_bytes
from sdc.compiler.calibration.table_file import read_table
from sdc.compiler.component import Component
from sdc.compiler.deepcache import divide_unet
from sdc.compiler.lora_argument import FoldedLora, LoraSource, parse_lora
from sdc.compiler.memory.graph_json import describe_memory
from sdc.compiler.precision.planning import passes_from_plan, plan_for
from sdc.compiler.sharding import shard_component
from sdc.compiler.workshop.cache import Entry
from sdc.engines.manifest import LoraEntry, ModelEntry
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import Target
from sdc.passes.base import Pass, PassReport, run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, low_rank_passes, lowering_passes, precision_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.correct_bias import CorrectBias
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.other_weights import plan_for_weights
from sdc.passes.precision.plan import PrecisionPlan
from sdc.passes.precision.plan_file import text_from_plan
from sdc.passes.precision.range_rules import DEFAULT_RULE, DYNAMIC, RangeRule
from sdc.passes.precision.smooth_quant import SmoothQuant
from sdc.passes.simplify.factorise_weights import LOW_RANK

if TYPE_CHECKING:
    from sdc.compiler.load import Checkpoint, GraphCheckpoint

MODEL_NAME = "model.onnx"
"""What the stage `export` leaves in its folder; the weights are beside it."""
TABLE_NAME = "unet.json"
"""What the stage `calibrate` leaves in its folder."""
PLAN_NAME = "unet.toml"
"""What the stage `build` leaves in its folder where layers have precisions of their own."""


@dataclass(frozen=True)
class Source:
    """What the user wants exported, as it was said.

    Attributes:
        model: see `load_model`.
        weights: "trained" or "random".
        seed: of random weights.
        loras: ``FILE[:SCALE]`` each.
        config: folder of configurations in diffusers' layout, for a single file that is not SD 1.x or 2.x at full size.
    """

    model: str
    weights: str = "trained"
    seed: int = 0
    loras: tuple[str, ...] = ()
    config: Path | None = None


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint, without its weights.

    Attributes:
        entry: for the manifest.
        digests: of each component's weights and configuration, LoRAs among them.
        base_digests: likewise without LoRAs.
        loras: those that are folded in, in order.
        configs: of each network, with the defaults of its class filled in.
        files: small files of the bundle, by path: see `small_files`.
    """

    entry: ModelEntry
    digests: Mapping[str, str]
    base_digests: Mapping[str, str]
    loras: tuple[FoldedLora, ...]
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bytes]


def open_source(source: Source) -> Opened:
    """Stage `load`: check that the checkpoint is whole, and digest it."""
    from sdc.compiler.load import Checkpoint
    from sdc.compiler.load.lora import is_consistency_lora
    from sdc.compiler.load.networks import NETWORKS, make_empty

    checkpoint = _checkpoint(source)
    base = replace(checkpoint, loras=()) if isinstance(checkpoint, Checkpoint) else checkpoint
    loras = tuple(LoraEntry(lora.path.name, lora.scale) for lora in checkpoint.loras)
    configs = {
        network: _plain(make_empty(network, checkpoint.config(network), origin=checkpoint.source).config)
        for network in NETWORKS
    }
    weights = "trained" if checkpoint.weights == "trained" else f"random, seed {source.seed}"
    return Opened(
        entry=ModelEntry(checkpoint.name, checkpoint.source, loras, weights),
        digests={component: checkpoint.digest(component) for component in COMPONENTS},
        base_digests={component: base.digest(component) for component in COMPONENTS},
        loras=tuple(
            FoldedLora(LoraSource(each.path).name, each.scale, each.sha256, few_steps=is_consistency_lora(each.path))
            for each in checkpoint.loras
        ),
        configs=configs,
        files=small_files(
            tokenizer_files=checkpoint.tokenizer_files,
            scheduler_config=checkpoint.scheduler_config,
            model_index=checkpoint.model_index,
            configs={network: {**checkpoint.config(network), **configs[network]} for network in NETWORKS},
        ),
    )


def export_stage(
    source: Source, component: str, configs: Mapping[str, Mapping[str, Any]], base: Path | None, folder: Path
) -> Any:
    """Stage `export`: one torch module, or a graph that was brought along, to ``model.onnx``, compared with it.

    Args:
        source: the checkpoint.
        component: of it.
        configs: as in `Opened`.
        base: where the stage left the component without LoRAs; None if it has not, or there are none.
        folder: gets the graph.
    """
    from sdc.compiler.load import GraphCheckpoint
    from sdc.compiler.trace.adopt import adopt_graph
    from sdc.compiler.trace.export import export_component
    from sdc.compiler.trace.patch import patch_component

    checkpoint, path = _checkpoint(source), folder / MODEL_NAME
    if isinstance(checkpoint, GraphCheckpoint):
        difference = adopt_graph(checkpoint.graphs[component], component, configs, path)
    else:
        patched = None
        if base is not None:
            patched = patch_component(checkpoint, component, configs, base=base / MODEL_NAME, path=path)
        difference = export_component(checkpoint, component, configs, path) if patched is None else patched
    return {"relative_difference": float(f"{difference:.0e}")}


@dataclass(frozen=True)
class Recipe:
    """What becomes of an exported component before it is lowered for a target.

    Attributes:
        spec: its interface.
        graph: result of the stage `export`.
        fuse: whether operators are fused.
        precision: one of `PRECISIONS`, or `MIXED`.
        plan: with `MIXED`: of its layers.
        in_float32: whether what is left in 16-bit floats is computed in float32, for a target without kernels for them.
        table: file of the calibration; None unless activations are quantised.
        overflows: result of the stage `check-fp16`; None where nothing is in float16.
        hoist: whether loop-invariant work leaves it.
        deepcache: depth of its shallow graph beside it; None for none.
        shards: number of engines that it is cut into; None for one, whole.
        rule: how ranges follow from the calibration.
        correct_bias: whether biases make up for rounded weights.
        automatic: result of the stage `plan`, for the report; None where no precision was chosen.
        other_weights: whether the plan may be one of the same layers with other weights.
    """

    spec: ComponentSpec
    graph: Entry
    fuse: bool
    precision: str
    table: Path | None
    plan: PrecisionPlan | None = None
    in_float32: bool = False
    overflows: Path | None = None
    hoist: bool = False
    deepcache: int | None = None
    shards: int | None = None
    rule: RangeRule = DEFAULT_RULE
    correct_bias: bool = False
    automatic: Mapping[str, Any] | None = None
    other_weights: bool = False


def build_stage(recipe: Recipe, target: Target, folder: Path) -> Any:
    """Stage `build`: passes, then the engine of one component for one target, in a folder of its name.

    What is hoisted out of a component, and the shallow UNet of DeepCache, become engines of their own beside it; shards
    stand in its place.
    """
    from sdc.compiler.build import build_engine

    typed, reports, plan = _planned_component(recipe, target.backend)
    components, divided = divide_unet(typed, hoist=recipe.hoist, deepcache=recipe.deepcache)
    whole = components[0].spec
    if recipe.shards is not None:
        shards, divided["sharding"] = shard_component(components[0], recipe.shards)
        components = (*shards, *components[1:])
    reports |= {phase: [_report_json(report)] for phase, report in divided.items()}
    engines = {}
    for component in components:
        lowering = _run(lowering_passes(target.backend), component)
        memory = describe_memory(component)
        built = build_engine(component, target, folder / component.spec.name)
        engines[component.spec.name] = {
            "spec": component.spec.to_json(),
            "files": list(built.files),
            "options": built.options,
            "built_with": built.built_with,
            "details": built.details,
            "memory": memory,
            "passes": {**(reports if component is components[0] else {}), "lowering": lowering},
        }
    if recipe.table is not None:
        # Kept with the engine: made again on another processor, the table could differ in the last digits.
        table = _table_with_ranges(recipe.table, replace(recipe.rule, results=False))
        (folder / TABLE_NAME).write_bytes(json_bytes(table.to_json()))
    if plan is not None:
        (folder / PLAN_NAME).write_text(text_from_plan(plan), encoding="utf-8")
    return {
        "export": recipe.graph.result,
        "spec": whole.to_json(),
        "engines": engines,
        "fp16": _overflow(recipe),
        "automatic": recipe.automatic,
    }


def typed_component(recipe: Recipe, backend: str | None = None) -> tuple[Component, dict[str, list[dict[str, Any]]]]:
    """The component of a recipe, before it is lowered for a backend, and the reports of its passes by phase."""
    component, reports, _ = _planned_component(recipe, backend)
    return component, reports


def _planned_component(
    recipe: Recipe, backend: str | None
) -> tuple[Component, dict[str, list[dict[str, Any]]], PrecisionPlan | None]:
    component, reports = fused_component(recipe.spec, recipe.graph.folder, recipe.fuse)
    islands = frozenset((_overflow(recipe) or {}).get("float32", ()))
    if recipe.precision in FLOATING:
        passes = precision_passes(recipe.precision, float32=islands, backend=backend, component=recipe.spec.name)
        reports["precision"] = _run(passes, component)
        return component, reports, None
    given = recipe.plan
    if given is not None and recipe.other_weights:
        given = plan_for_weights(component.model, given)
    plan = plan_for(component, recipe.precision, given)
    passes = planned_passes(
        plan,
        recipe.table,
        recipe.rule,
        correct_bias=recipe.correct_bias,
        in_float32=recipe.in_float32,
        islands=islands,
        backend=backend,
    )
    reports["precision"] = _run(passes, component)
    return component, reports, plan


def planned_passes(
    plan: PrecisionPlan,
    table_file: Path | None,
    rule: RangeRule,
    *,
    correct_bias: bool,
    in_float32: bool,
    islands: frozenset[str],
    backend: str | None,
) -> tuple[Pass, ...]:
    """The precision phase of a planned component, as its engine has it.

    Args:
        plan: of its layers.
        table_file: as in `quantising_passes`; likewise `rule` and `correct_bias`.
        in_float32: whether what the plan leaves in 16-bit floats is computed in float32.
        islands: nodes that stay in float32, whatever the plan.
        backend: what the component is lowered for, as in `precision_passes`.
    """
    run = plan.with_default(Format.FP32) if in_float32 else plan
    quantise, correct = quantising_passes(table_file, rule, run, correct_bias=correct_bias)
    return passes_from_plan(run, quantise, correct=correct, float32=islands, backend=backend)


def quantising_passes(
    table_file: Path | None, rule: RangeRule, plan: PrecisionPlan | None, *, correct_bias: bool
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """What stands between the fused graph and its integers, in order; and what corrects biases by the final integers.

    Args:
        table_file: of the calibration; None where no activation is quantised.
        rule: how ranges follow from it.
        plan: of the layers; None for that of "int8".
        correct_bias: whether biases make up for rounded weights.

    Raises:
        InputError: the file cannot be read, or is no calibration.
    """
    if plan is not None and plan.formats() <= FLOATING:
        return (), ()
    if table_file is None:
        return () if plan is None else (InsertQdq(None, plan),), ()
    table = _table_with_ranges(table_file, replace(rule, results=False))
    smooth = () if table.smoothing is None else (SmoothQuant(table.smoothing),)
    correct = (CorrectBias(table),) if correct_bias else ()
    return (*smooth, InsertQdq(table, plan, rule=rule)), correct


@lru_cache(maxsize=1)
def _table_with_ranges(path: Path, rule: RangeRule) -> CalibrationTable:
    """A calibration with both kinds of ranges of a method written down: targets of one bundle share the file."""
    if rule.method == DYNAMIC:
        return read_table(path)
    return read_table(path).with_ranges([replace(rule, symmetric=symmetric) for symmetric in (True, False)])


def _overflow(recipe: Recipe) -> dict[str, Any] | None:
    """What float16 does not hold, as the stage `check-fp16` has it; None if it holds everything."""
    if recipe.overflows is None:
        return None
    found: dict[str, Any] | None = json.loads(recipe.overflows.read_text(encoding="utf-8")).get(recipe.spec.name)
    return found


def fused_component(spec: ComponentSpec, folder: Path, fuse: bool) -> tuple[Component, dict[str, list[dict[str, Any]]]]:
    """An exported component with its operators fused, if `fuse`; and the reports of the passes by phase.

    Weights of low rank are split if the checkpoint says that there are any: looking for them takes time.
    """
    component = Component(spec, ir.load(folder / MODEL_NAME))
    reports = {"canonical": _run(canonical_passes(), component)}
    if fuse:
        reports["fusion"] = _run(fusion_passes(spec.name), component)
    if LOW_RANK in component.model.metadata_props:
        reports["low rank"] = _run(low_rank_passes(), component)
    return component, reports


def _run(passes: tuple[Pass, ...], component: Component) -> list[dict[str, Any]]:
    return [_report_json(report) for report in run_passes(passes, component.model)]


def _report_json(report: PassReport) -> dict[str, Any]:
    """A report without its time, which would make equal exports differ."""
    values = asdict(report)
    del values["seconds"]
    return {name: value for name, value in values.items() if value is not None}


@lru_cache(maxsize=1)
def _checkpoint(source: Source) -> Checkpoint | GraphCheckpoint:
    """The opened checkpoint; it holds no weights, so the worker keeps it between stages."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from sdc.compiler.load import Weights, load_model

    # The progress bars of torch's and Hugging Face's libraries share a semaphore of the system by default, which would
    # stay behind when the worker is killed.
    tqdm.set_lock(threading.RLock())

    return load_model(
        source.model,
        weights=cast(Weights, source.weights),
        seed=source.seed,
        loras=[parse_lora(lora) for lora in source.loras],
        configs=source.config,
    )


def _plain(config: Any) -> dict[str, Any]:
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return dict(json.loads(json.dumps(values, default=str)))
