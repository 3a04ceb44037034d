"""`sdc inspect`: the description of a bundle or of one engine file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.inspect.engine_file import EngineFile
from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.checked_json import read_json
from sdc.engines.errors import InputError
from sdc.engines.manifest import MANIFEST_NAME, Manifest
from sdc.engines.targets import Target, runnable

PASS_REPORTS = "reports/passes.json"

TIDYING = ("remove-unused",)
"""Passes of the phases that are told of which only clean up after the others."""


@dataclass(frozen=True)
class FusionCount:
    """What one fusion or quantisation pass did to a component.

    Attributes:
        name: of the pass.
        matched: rewritten sites.
        skipped: sites that were left alone.
    """

    name: str
    matched: int
    skipped: int


@dataclass(frozen=True)
class BundleDescription:
    """An opened bundle and what its engines are.

    Attributes:
        path: of the folder.
        manifest: what it says of itself.
        engines: by target and component.
        passes: by target and component, the passes that rewrote something or skipped a site; empty without reports.
        unrunnable: by target, why this machine cannot run it; only those it cannot.
    """

    path: str
    manifest: Manifest
    engines: Mapping[str, Mapping[str, EngineFile]]
    passes: Mapping[str, Mapping[str, tuple[FusionCount, ...]]]
    unrunnable: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Size of all its files, the manifest aside."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "manifest": self.manifest.to_json(),
            "engines": {
                target: {component: engine.to_json() for component, engine in engines.items()}
                for target, engines in self.engines.items()
            },
            "passes": {
                target: {component: [asdict(each) for each in counts] for component, counts in components.items()}
                for target, components in self.passes.items()
            },
            "unrunnable": dict(self.unrunnable),
        }


def inspect_path(path: Path) -> BundleDescription | EngineFile:
    """Describe a bundle's folder, or an ``.onnx``, ``.xml`` or ``.plan`` file.

    Raises:
        BundleError: the bundle is damaged.
        InputError: there is nothing at `path`, or the file is none of these or damaged.
    """
    if path.is_dir():
        return inspect_bundle(open_bundle(path))
    if path.name == MANIFEST_NAME:
        return inspect_bundle(open_bundle(path.parent))
    return inspect_engine(path)


def inspect_engine(path: Path) -> EngineFile:
    """Describe an engine file by its ending.

    Raises:
        InputError: there is no such file, its ending is unknown, or it is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} not found", hint="give a bundle's folder, or an .onnx, .xml or .plan file")
    if path.suffix == ".onnx":
        from sdc.compiler.inspect.onnx_file import inspect_onnx

        return inspect_onnx(path)
    if path.suffix == ".xml":
        from sdc.compiler.inspect.openvino_file import inspect_openvino

        return inspect_openvino(path)
    if path.suffix in (".plan", ".engine"):
        from sdc.compiler.inspect.plan_file import inspect_plan

        return inspect_plan(path)
    raise InputError(f"{path} has an unknown ending", hint="give a bundle's folder, or an .onnx, .xml or .plan file")


def inspect_bundle(bundle: Bundle) -> BundleDescription:
    """Describe a bundle and every engine in it.

    Raises:
        BundleError: a file has changed since the export.
        InputError: an engine file is damaged.
    """
    manifest = bundle.manifest
    bundle.check_digests()
    reasons = {
        name: runnable(Target(name, entry.backend, entry.compute_capabilities))
        for name, entry in manifest.targets.items()
    }
    return BundleDescription(
        path=str(bundle.path),
        manifest=manifest,
        engines={
            target: {
                component: inspect_engine(bundle.path / engine.files[0]) for component, engine in entry.engines.items()
            }
            for target, entry in manifest.targets.items()
        },
        passes=_pass_counts(bundle),
        unrunnable={name: reason for name, reason in reasons.items() if reason is not None},
    )


def find_origin(path: Path) -> tuple[BundleDescription, str, str] | None:
    """The bundle, target and component that an engine file belongs to; None if it stands alone."""
    for folder in list(path.resolve().parents)[:2]:
        if (folder / MANIFEST_NAME).is_file():
            bundle = open_bundle(folder)
            name = path.resolve().relative_to(folder).as_posix()
            for target, entry in bundle.manifest.targets.items():
                for component, engine in entry.engines.items():
                    if name in engine.files:
                        return inspect_bundle(bundle), target, component
    return None


def _pass_counts(bundle: Bundle) -> dict[str, dict[str, tuple[FusionCount, ...]]]:
    """By target and component, from the reports that the export left."""
    counts: dict[str, dict[str, tuple[FusionCount, ...]]] = {}
    if PASS_REPORTS not in bundle.manifest.files:
        return counts
    for component, targets in read_json(bundle.path / PASS_REPORTS).members():
        for target, phases in targets.members():
            found = [
                FusionCount(
                    name=report.member("name").text(),
                    matched=report.member("matched").integer(0),
                    skipped=len(list(report.member("skipped").elements())),
                )
                for phase, reports in phases.members()
                if phase in ("fusion", "precision", "hoisting", "deepcache", "sharding")
                for report in reports.elements()
            ]
            counts.setdefault(target, {})[component] = tuple(
                each for each in found if (each.matched or each.skipped) and each.name not in TIDYING
            )
    return counts
