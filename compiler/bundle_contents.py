"""What a bundle consists of, from the results of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sdc.compiler.bundle_writer import CachedFile, Contents, file_entries, json_bytes
from sdc.compiler.cache import Entry
from sdc.compiler.export_plan import QUANTISED, ExportPlan, ExportRequest, tool_versions
from sdc.compiler.interfaces import pipeline_settings
from sdc.compiler.stages import TABLE_NAME, Opened
from sdc.engines.manifest import SCHEMA, EngineEntry, Manifest, TargetEntry
from sdc.engines.specs import COMPONENTS
from sdc.engines.targets import Target

Built = Mapping[tuple[str, str], Entry]
"""Results of the stage `build`, by component and name of the target."""


def bundle_contents(request: ExportRequest, opened: Opened, built: Built) -> Contents:
    """Every file but the manifest."""
    contents: dict[str, bytes | CachedFile] = dict(opened.files)
    for (component, _), entry in built.items():
        for name in entry.result["engine"]["files"]:
            contents[f"{component}/{name}"] = CachedFile(entry, name)
        if component in QUANTISED and TABLE_NAME in entry.files:
            contents[f"calibration/{component}.json"] = CachedFile(entry, TABLE_NAME)
    contents["reports/passes.json"] = json_bytes(_by_component(built, "passes"))
    contents["reports/export.json"] = json_bytes(
        {
            "tools": tool_versions(request),
            "exports": {component: entry.result["export"] for (component, _), entry in built.items()},
            "engines": _by_component(built, "details"),
        }
    )
    return contents


def bundle_manifest(
    request: ExportRequest, opened: Opened, plan: ExportPlan, built: Built, contents: Contents
) -> Manifest:
    """The manifest; it depends on nothing but its arguments and the version of sdc."""
    return Manifest(
        schema=SCHEMA,
        sdc_version=version("sdc"),
        model=opened.entry,
        precision=request.precision,
        fused=request.fuse,
        components=plan.specs,
        pipeline=pipeline_settings(opened.configs),
        targets={target.name: _target_entry(target, built) for target in request.targets},
        files=file_entries(contents),
    )


def _target_entry(target: Target, built: Built) -> TargetEntry:
    results = {component: built[component, target.name].result for component in COMPONENTS}
    return TargetEntry(
        backend=target.backend,
        built_with={tool: found for result in results.values() for tool, found in result["built_with"].items()},
        compute_capabilities=target.compute_capabilities,
        engines={
            component: EngineEntry(
                files=tuple(f"{component}/{name}" for name in result["engine"]["files"]),
                options=result["engine"]["options"],
            )
            for component, result in results.items()
        },
    )


def _by_component(built: Built, part: str) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for (component, target), entry in built.items():
        values.setdefault(component, {})[target] = entry.result[part]
    return values
