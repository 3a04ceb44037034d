"""The graph that ablation and bisection start from: a model's component as the exporter wrote it, or an ONNX file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from sdc.compiler.compare.subject import lone_spec
from sdc.compiler.export_plan import ExportRequest, plan_export
from sdc.compiler.inspect.onnx_file import inspect_onnx
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import MODEL_NAME, Opened, Source, export_stage, open_source
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.progress import Progress, StageLog
from sdc.compiler.workshop.worker import Worker
from sdc.compiler.workshop.workshop import Workshop
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, ComponentSpec
from sdc.engines.targets import Target


@dataclass(frozen=True)
class ExportedGraph:
    """A graph on disk, before any pass.

    Attributes:
        spec: its interface.
        path: the ONNX file.
        origin: what it is, for reports.
    """

    spec: ComponentSpec
    path: Path
    origin: str


def exported_graph(
    source: Source, component: str, target: Target, *, cache: StageCache, progress: Progress
) -> ExportedGraph:
    """The graph of a component, from the cache of `sdc export` if it is there.

    Args:
        source: a checkpoint; or, as its model, the path of an .onnx file, which is taken as it is.
        component: of a checkpoint.
        target: what engines will be built for.
        cache: where exports are kept.
        progress: is told of the stages.

    Raises:
        InputError: there is no such model or component.
        ExportError: the export failed.
    """
    if source.model.endswith(".onnx") and not Path(source.model).is_dir():
        path = Path(source.model)
        if not path.is_file():
            raise InputError(f"{path} not found", hint="give a model or an .onnx file")
        return ExportedGraph(lone_spec(inspect_onnx(path)), path, str(path))
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}", hint=f"choose one of {', '.join(COMPONENTS)}")
    with (
        tempfile.TemporaryDirectory(prefix="sdc-compare-") as scratch,
        Worker(log_path=Path(scratch, "worker.log")) as worker,
    ):
        shop = Workshop(cache, worker, StageLog(progress))
        with shop.stages.stage("load"):
            opened: Opened = worker.call(open_source, source).value
        plan = plan_export(ExportRequest(source, PrecisionRequest("fp32"), (target,), out=Path(scratch)), opened)
        entry = shop.produce(
            f"export {component}",
            "export",
            plan.export_keys[component],
            export_stage,
            source,
            component,
            opened.configs,
        )
    origin = f"{component} of {opened.entry.name}, weights {opened.entry.weights}"
    return ExportedGraph(plan.specs[component], entry.folder / MODEL_NAME, origin)
