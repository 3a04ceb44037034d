"""The graph that ablation and bisection start from: a model's component as the exporter wrote it, or an ONNX file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from sdc.compiler.compare.subject import lone_spec
from sdc.compiler.compile import calibrate_unet, export_one
from sdc.compiler.export_plan import QUANTISED, ExportRequest, component_precision, plan_export
from sdc.compiler.inspect.onnx_file import inspect_onnx
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import MODEL_NAME, TABLE_NAME, Opened, Source, open_source
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
        table: file of the calibration; None unless it is to be quantised.
    """

    spec: ComponentSpec
    path: Path
    origin: str
    table: Path | None = None


def exported_graph(
    source: Source,
    component: str,
    target: Target,
    *,
    precision: str = "fp32",
    cache: StageCache,
    progress: Progress,
) -> ExportedGraph:
    """The graph of a component, from the cache of `sdc export` if it is there.

    Args:
        source: a checkpoint; or, as its model, the path of an .onnx file, which is taken as it is.
        component: of a checkpoint.
        target: what engines will be built for.
        precision: "int8" has the graph calibrated as `sdc export` does it.
        cache: where exports and calibrations are kept.
        progress: is told of the stages.

    Raises:
        InputError: there is no such model or component, or it is not one that "int8" quantises.
        ExportError: the export or the calibration failed.
    """
    if source.model.endswith(".onnx") and not Path(source.model).is_dir():
        path = Path(source.model)
        if not path.is_file():
            raise InputError(f"{path} not found", hint="give a model or an .onnx file")
        if precision == "int8":
            raise InputError(
                f"{path} cannot be calibrated: int8 needs denoising runs of a whole model", hint="name the model"
            )
        return ExportedGraph(lone_spec(inspect_onnx(path)), path, str(path))
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}", hint=f"choose one of {', '.join(COMPONENTS)}")
    if precision == "int8" and component not in QUANTISED:
        raise InputError(
            f"int8 quantises {', '.join(QUANTISED)} alone; {component} stays in floating point",
            hint=f"choose --precision {component_precision(component, PrecisionRequest(precision), target)}",
        )
    request = ExportRequest(source, PrecisionRequest(precision), (target,), out=Path())
    with (
        tempfile.TemporaryDirectory(prefix="sdc-compare-") as scratch,
        Worker(log_path=Path(scratch, "worker.log")) as worker,
    ):
        shop = Workshop(cache, worker, StageLog(progress))
        with shop.stages.stage("load"):
            opened: Opened = worker.call(open_source, source).value
        plan = plan_export(request, opened)
        exported = {
            name: export_one(shop, source, opened, plan, name)
            for name in (component, *(("text_encoder",) if precision == "int8" else ()))
        }
        worker.close()  # torch and its memory go
        table = calibrate_unet(shop, request, opened, plan, exported) if precision == "int8" else None
    return ExportedGraph(
        spec=plan.specs[component],
        path=exported[component].folder / MODEL_NAME,
        origin=f"{component} of {opened.entry.name}, weights {opened.entry.weights}",
        table=None if table is None else table.folder / TABLE_NAME,
    )
