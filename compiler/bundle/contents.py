"""What a bundle consists of, from the results of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sdc.compiler.bundle.request_file import REQUEST_NAME, request_json
from sdc.compiler.bundle.writer import CachedFile, Contents, compact_json_bytes, file_entries, json_bytes
from sdc.compiler.export_plan import QUANTISED, ExportRequest, tool_versions
from sdc.compiler.hoisting import common_specs
from sdc.compiler.memory.graph_json import MEMORY_REPORT
from sdc.compiler.stages import PLAN_NAME, TABLE_NAME, Opened
from sdc.compiler.trace.interfaces import pipeline_settings
from sdc.compiler.workshop.cache import Entry
from sdc.engines.manifest import SCHEMA, EngineEntry, Manifest, TargetEntry
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import Target

Built = Mapping[tuple[str, str], Entry]
"""Results of the stage `build`, by component and name of the target."""


def bundle_contents(request: ExportRequest, opened: Opened, built: Built) -> Contents:
    """Every file but the manifest."""
    contents: dict[str, bytes | CachedFile] = dict(opened.files)
    for (component, _), entry in built.items():
        for engine, result in entry.result["engines"].items():
            for name in result["files"]:
                contents[f"{engine}/{name}"] = CachedFile(entry, f"{engine}/{name}")
        if component in QUANTISED and TABLE_NAME in entry.files:
            contents[f"calibration/{component}.json"] = CachedFile(entry, TABLE_NAME)
        if component in QUANTISED and PLAN_NAME in entry.files:
            contents[f"precision/{component}.toml"] = CachedFile(entry, PLAN_NAME)
    contents[REQUEST_NAME] = json_bytes(request_json(request, opened))
    contents["reports/passes.json"] = json_bytes(_by_component(built, "passes"))
    contents[MEMORY_REPORT] = compact_json_bytes(_by_component(built, "memory"))
    contents["reports/export.json"] = json_bytes(
        {
            "tools": tool_versions(request),
            "exports": {component: entry.result["export"] for (component, _), entry in built.items()},
            "engines": _by_component(built, "details"),
            "fp16": {component: entry.result["fp16"] for (component, _), entry in built.items()},
            "automatic": {component: entry.result["automatic"] for (component, _), entry in built.items()},
        }
    )
    return contents


def bundle_manifest(request: ExportRequest, opened: Opened, built: Built, contents: Contents) -> Manifest:
    """The manifest; it depends on nothing but its arguments and the version of sdc.

    Raises:
        ExportError: the engines of two targets have different interfaces.
    """
    return Manifest(
        schema=SCHEMA,
        sdc_version=version("sdc"),
        model=opened.entry,
        precision=request.precision.name,
        fused=request.fuse,
        components=common_specs(
            {
                target.name: [ComponentSpec.from_json(spec) for spec in _specs(target, built).values()]
                for target in request.targets
            }
        ),
        pipeline=pipeline_settings(opened.configs),
        targets={target.name: _target_entry(target, built) for target in request.targets},
        files=file_entries(contents),
    )


def _target_entry(target: Target, built: Built) -> TargetEntry:
    results = _engines(target, built)
    return TargetEntry(
        backend=target.backend,
        built_with={tool: found for result in results.values() for tool, found in result["built_with"].items()},
        compute_capabilities=target.compute_capabilities,
        engines={
            component: EngineEntry(
                files=tuple(f"{component}/{name}" for name in result["files"]),
                options=result["options"],
            )
            for component, result in results.items()
        },
    )


def _engines(target: Target, built: Built) -> dict[str, Any]:
    """Results by component, those of engines beside another among them."""
    stages = [built[component, target.name].result["engines"] for component in COMPONENTS]
    return {component: result for engines in stages for component, result in engines.items()}


def _specs(target: Target, built: Built) -> dict[str, Any]:
    """Interfaces by component: of those that are whole, which an engine need not have, and of all engines."""
    specs: dict[str, Any] = {}
    for component in COMPONENTS:
        result = built[component, target.name].result
        specs[component] = result["spec"]
        specs |= {name: engine["spec"] for name, engine in result["engines"].items()}
    return specs


def _by_component(built: Built, part: str) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for (_, target), entry in built.items():
        for engine, result in entry.result["engines"].items():
            values.setdefault(engine, {})[target] = result[part]
    return values
