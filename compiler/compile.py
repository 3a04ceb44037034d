"""`sdc export`: from a checkpoint to a bundle. The stages and their order are in `export_bundle`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdc.compiler.automatic_stage import Automatic, automatic_stage
from sdc.compiler.bundle.contents import bundle_contents, bundle_manifest
from sdc.compiler.bundle.writer import check_output, is_up_to_date, write_bundle
from sdc.compiler.calibration_stage import Calibration, calibrate_stage
from sdc.compiler.export_plan import (
    HOISTED_FROM,
    QUANTISED,
    ExportPlan,
    ExportRequest,
    automatic_defaults,
    automatic_rule,
    component_depth,
    component_plan,
    component_precision,
    component_shards,
    plan_export,
)
from sdc.compiler.half_stage import OVERFLOWS_NAME, HalfCheck, check_half_stage
from sdc.compiler.precision.capabilities import in_float32
from sdc.compiler.stages import (
    PLAN_NAME,
    TABLE_NAME,
    Opened,
    Recipe,
    Source,
    build_stage,
    export_stage,
    open_source,
)
from sdc.compiler.trace.guards import check_request, explaining_full_disk
from sdc.compiler.workshop.cache import Entry, StageCache
from sdc.compiler.workshop.memory_watch import MemoryWatch
from sdc.compiler.workshop.progress import Progress, Silent, StageLog, StageRecord
from sdc.compiler.workshop.staging import exclusive
from sdc.compiler.workshop.worker import Worker
from sdc.compiler.workshop.workshop import Workshop
from sdc.engines.environment import cache_folder
from sdc.engines.errors import InputError
from sdc.engines.manifest import Manifest
from sdc.engines.processor import MOST_WEIGHT_BITS
from sdc.engines.specs import COMPONENTS
from sdc.passes.precision.formats import Format
from sdc.passes.precision.plan_file import read_plan

log = logging.getLogger(__name__)

CACHE_LIMIT_BYTES = 32 * 2**30
"""Beyond this, results that were not used for longest are removed. SD 1.5 takes 4 GB, its engines 1 to 4 GB more."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    Attributes:
        out: the bundle.
        manifest: what its `sdc.json` says.
        few_steps: whether a LoRA for the sampler lcm is folded in.
        up_to_date: the same bundle was there already, and was left as it is.
        records: the stages.
        memory_limit_bytes: that was kept, if any.
    """

    out: Path
    manifest: Manifest
    few_steps: bool
    up_to_date: bool
    records: tuple[StageRecord, ...]
    memory_limit_bytes: int | None = None


def export_bundle(
    request: ExportRequest, *, cache: StageCache | None = None, progress: Progress | None = None, verbose: bool = False
) -> ExportSummary:
    """Compile a checkpoint into a bundle.

    Whatever happens, there is a whole bundle at ``request.out`` afterwards, the new or the old one, or none.
    The work is done in a child process: a script that calls this needs ``if __name__ == "__main__":``.

    Args:
        request: what to export.
        cache: results of stages; the user's own if None.
        progress: is told of every stage.
        verbose: leave what libraries print on standard error.

    Raises:
        InputError: the request cannot be met; also if something that is no bundle is in its place.
        TargetError: an engine cannot be built here.
        ExportError: a stage failed or needed more memory than is allowed, or the disk is full.
    """
    request = replace(request, out=request.out.absolute())
    cache = cache or StageCache(cache_folder() / "stages")
    check_request(request)
    with (
        explaining_full_disk(request.out.parent, cache.root),
        exclusive(request.out, on_wait=lambda: log.warning("waiting for another export to %s", request.out)),
        tempfile.TemporaryDirectory(prefix="sdc-export-") as scratch,
        Worker(log_path=None if verbose else Path(scratch, "worker.log")) as worker,
        ExitStack() as watching,
    ):
        memory = None
        if request.memory_limit_bytes is not None:
            memory = watching.enter_context(MemoryWatch(request.memory_limit_bytes, worker.kill))
        shop = Workshop(cache, worker, StageLog(progress or Silent()), memory)
        opened = _load(shop, request)
        plan = plan_export(request, opened)
        automatic = _known(shop, "plan", plan.automatic_key)
        overflows = _known(shop, "check-fp16", plan.half_key)
        undecided = plan.automatic_key is not None and automatic is None
        unchecked = plan.half_key is not None and overflows is None
        request, plan = _with_findings(request, opened, automatic, overflows)
        missing = _all_builds(request) if undecided or unchecked else _missing_builds(shop, plan)
        exported = _export_components(shop, request, opened, plan, missing)
        worker.close()  # torch and its memory go
        calibrates = plan.calibration_key is not None and missing["unet"]
        table = calibrate_unet(shop, request, opened, plan, exported) if calibrates else None
        if unchecked:
            overflows = _check_half(shop, request, opened, plan, exported)
        if undecided:
            assert table is not None
            assert overflows is not None
            automatic = _choose_precisions(shop, request, opened, plan, exported, table, overflows)
        request, plan = _with_findings(request, opened, automatic, overflows)
        worker.close()  # what was held for the checks goes
        built = _build_engines(shop, request, plan, exported, table, overflows, automatic)
        up_to_date, manifest = _write(shop, request, opened, built)
    cache.evict(CACHE_LIMIT_BYTES, now_seconds=time.time())
    few_steps = any(lora.few_steps for lora in opened.loras)
    return ExportSummary(
        request.out, manifest, few_steps, up_to_date, tuple(shop.stages.records), request.memory_limit_bytes
    )


def _load(shop: Workshop, request: ExportRequest) -> Opened:
    with shop.stage("load") as outcome:
        done = shop.worker.call(open_source, request.source)
        outcome.peak_memory_bytes = done.peak_memory_bytes
        opened: Opened = done.value
    if request.base_digests not in (None, opened.base_digests):
        raise InputError(
            f"{request.source.model} is another checkpoint now than the one that the bundle was made from",
            hint=f"bring that one back ({opened.entry.source} is what was found), or export this one",
        )
    return opened


def _known(shop: Workshop, stage: str, key: str | None) -> Entry | None:
    """What an earlier export with the same key has found."""
    entry = None if key is None else shop.cache.find(stage, key)
    return None if entry is None or entry.damage() is not None else entry


def _with_findings(
    request: ExportRequest, opened: Opened, automatic: Entry | None, overflows: Entry | None
) -> tuple[ExportRequest, ExportPlan]:
    """The request with the plan that was chosen for it, if any; and the keys of its engines, as far as all is found."""
    if automatic is not None:
        chosen = read_plan(automatic.folder / PLAN_NAME)
        request = replace(request, precision=replace(request.precision, plan=chosen))
    return request, plan_export(request, opened, None if overflows is None else overflows.result)


def _all_builds(request: ExportRequest) -> dict[str, list[str]]:
    return {name: [target.name for target in request.targets] for name in COMPONENTS}


def _missing_builds(shop: Workshop, plan: ExportPlan) -> dict[str, list[str]]:
    """By component, the targets whose engines are not in the cache."""
    missing: dict[str, list[str]] = {name: [] for name in COMPONENTS}
    for (name, target), key in plan.build_keys.items():
        entry = shop.cache.find("build", key)
        if entry is None or entry.damage() is not None:
            missing[name].append(target)
    return missing


def _export_components(
    shop: Workshop,
    request: ExportRequest,
    opened: Opened,
    plan: ExportPlan,
    missing: Mapping[str, list[str]],
) -> dict[str, Entry]:
    """The graphs that later stages need, one after the other."""
    needed = [name for name in COMPONENTS if missing[name]]
    if plan.calibration_key and missing["unet"]:
        needed = [name for name in COMPONENTS if name in (*needed, "text_encoder")]
    return {name: export_one(shop, request.source, opened, plan, name) for name in needed}


def export_one(shop: Workshop, source: Source, opened: Opened, plan: ExportPlan, name: str) -> Entry:
    """The graph of a component, from the cache or made; with LoRAs from the graph without them, if that is there."""
    key, base_key = plan.export_keys[name], plan.base_export_keys[name]
    base = None if base_key == key else _known(shop, "export", base_key)
    folder = None if base is None else base.folder
    return shop.produce(f"export {name}", "export", key, export_stage, source, name, opened.configs, folder)


def calibrate_unet(
    shop: Workshop, request: ExportRequest, opened: Opened, plan: ExportPlan, exported: Mapping[str, Entry]
) -> Entry:
    """The calibration table of a plan that quantises, made or from the cache; `exported` holds the graphs it needs."""
    assert plan.calibration_key is not None
    inputs = Calibration(
        model=opened.entry.name,
        unet=plan.specs["unet"],
        unet_folder=exported["unet"].folder,
        text_encoder=plan.specs["text_encoder"],
        text_encoder_folder=exported["text_encoder"].folder,
        configs=opened.configs,
        files=opened.files,
        prompts=plan.prompts,
        fuse=request.fuse,
        smoothing=request.calibration.smoothing,
        table=request.calibration.table_file,
        other_weights=request.other_weights,
        steps=request.calibration.steps,
        size_px=request.calibration.size_px,
        timesteps=request.calibration.timesteps,
    )
    bits = {request.calibration.rule_for(target).weight_bits for target in request.targets}
    if request.calibration.reduce_range is None and min(bits) < MOST_WEIGHT_BITS:
        log.warning(
            "int8 weights for CPUs have 7 bits, since this processor has no VNNI and its products of 8 bits saturate; "
            "for processors that have it, use --no-reduce-range"
        )
    return shop.produce("calibrate unet", "calibrate", plan.calibration_key, calibrate_stage, inputs, reports=True)


def _check_half(
    shop: Workshop, request: ExportRequest, opened: Opened, plan: ExportPlan, exported: Mapping[str, Entry]
) -> Entry:
    assert plan.half_key is not None
    inputs = _drawing(request, opened, plan, exported)
    entry = shop.produce("check fp16", "check-fp16", plan.half_key, check_half_stage, inputs, reports=True)
    # Where all targets have a component in bfloat16, it holds whatever float32 does.
    bfloat16 = {
        name
        for name in COMPONENTS
        if all(component_precision(name, request.precision, each) == Format.BF16.value for each in request.targets)
    }
    for name, overflow in entry.result.items():
        if name in bfloat16:
            continue
        log.warning(
            "%s: node %r reaches %.3g and float16 holds 65504; %d nodes around such values stay in float32",
            name,
            overflow["first"],
            overflow["magnitude"],
            len(overflow["float32"]),
        )
    return entry


def _drawing(request: ExportRequest, opened: Opened, plan: ExportPlan, exported: Mapping[str, Entry]) -> HalfCheck:
    return HalfCheck(
        model=opened.entry.name,
        specs=plan.specs,
        folders={name: entry.folder for name, entry in exported.items()},
        configs=opened.configs,
        files=opened.files,
        prompts=plan.prompts,
        fuse=request.fuse,
    )


def _choose_precisions(
    shop: Workshop,
    request: ExportRequest,
    opened: Opened,
    plan: ExportPlan,
    exported: Mapping[str, Entry],
    table: Entry,
    overflows: Entry,
) -> Entry:
    """The stage that chooses precisions, run or from the cache."""
    assert plan.automatic_key is not None
    assert request.precision.budget is not None
    budget = request.precision.budget
    inputs = Automatic(
        drawing=_drawing(request, opened, plan, exported),
        table=table.folder / TABLE_NAME,
        overflows=overflows.folder / OVERFLOWS_NAME,
        budget=budget,
        defaults=automatic_defaults(request),
        targets=request.targets,
        rule=automatic_rule(request),
        rules={target.name: request.calibration.rule_for(target) for target in request.targets},
        correct_bias=request.calibration.correct_bias,
        hoist=request.hoist,
    )
    entry = shop.produce("plan unet", "plan", plan.automatic_key, automatic_stage, inputs, reports=True)
    found = {name: count for name, count in entry.result["layers"].items() if count}
    log.warning(
        "unet: %s; %s measured for %s asked, on %d pictures of %d steps at guidance %g; %s",
        ", ".join(f"{count} layers {name}" for name, count in found.items()),
        budget.text(entry.result["quality"]),
        budget.text(budget.limit),
        *(entry.result["drawn"][name] for name in ("pictures", "steps", "guidance_scale")),
        _told_time(entry.result),
    )
    return entry


def _told_time(automatic: Mapping[str, Any]) -> str:
    """What a plan saves, as far as is known."""
    floating = automatic["floating"]
    chosen = automatic["candidates"][automatic["chosen"]]["step_seconds"]
    if chosen is None:
        return f"by assumed rates the layers take {100 * automatic['layer_time']:.0f} % of the time in {floating}"
    usual = automatic["candidates"][floating]["step_seconds"]
    return "; ".join(
        f"a step of the UNet takes {1000 * seconds:.1f} ms on {target}, {1000 * usual[target]:.1f} in {floating}"
        for target, seconds in chosen.items()
    )


def _build_engines(
    shop: Workshop,
    request: ExportRequest,
    plan: ExportPlan,
    exported: Mapping[str, Entry],
    table: Entry | None,
    overflows: Entry | None,
    automatic: Entry | None,
) -> dict[tuple[str, str], Entry]:
    """Passes, then an engine, for each component and target."""
    built = {}
    for name in COMPONENTS:
        for target in request.targets:
            graph = exported.get(name)  # None: the engine is in the cache
            precision = component_precision(name, request.precision, target)
            recipe = graph and Recipe(
                spec=plan.specs[name],
                graph=graph,
                fuse=request.fuse,
                precision=precision,
                plan=component_plan(name, request.precision),
                in_float32=in_float32(target),
                overflows=overflows.folder / OVERFLOWS_NAME if overflows and precision != Format.BF16.value else None,
                table=table.folder / TABLE_NAME if table and name in QUANTISED else None,
                hoist=request.hoist and name in HOISTED_FROM,
                deepcache=component_depth(name, request),
                shards=component_shards(name, request),
                rule=request.calibration.rule_for(target),
                correct_bias=request.calibration.correct_bias,
                automatic=automatic.result if automatic and name in QUANTISED else None,
                other_weights=request.other_weights,
            )
            key = plan.build_keys[name, target.name]
            label = f"build {name} for {target.name}"
            built[name, target.name] = shop.produce(label, "build", key, build_stage, recipe, target)
    return built


def _write(
    shop: Workshop,
    request: ExportRequest,
    opened: Opened,
    built: Mapping[tuple[str, str], Entry],
) -> tuple[bool, Manifest]:
    with shop.stage("write bundle") as outcome:
        contents = bundle_contents(request, opened, built)
        manifest = bundle_manifest(request, opened, built, contents)
        outcome.cached = is_up_to_date(request.out, manifest)
        if not outcome.cached:
            check_output(request.out)
            write_bundle(request.out, manifest, contents)
    return outcome.cached, manifest
