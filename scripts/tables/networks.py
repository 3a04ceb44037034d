"""Networks of `tiny` that are made smaller for a table, each once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from sdc.compiler.compile import export_bundle
from sdc.compiler.compress.compress import compress
from sdc.compiler.compress.report import JSON_FILE
from sdc.compiler.compress.settings import CompressSettings
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.distill.training_data import LATENTS
from sdc.compiler.distill.training_loop import Reporting
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.load import load_checkpoint
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.engines.targets import parse_targets


def compressed(name: str, settings: CompressSettings, pictures: TinyPictures, out: Path) -> tuple[Path, Any]:
    """A network with the settings, made now or in an earlier call; a run that was interrupted goes on.

    Args:
        name: of its folder below `out`.
        settings: of the compression.
        pictures: to learn from; they are encoded once for all networks below `out`.
        out: folder of a table.

    Returns:
        The checkpoint's folder and the report.
    """
    folder, work = out / name / JUDGED_MODEL, out / name / "work"
    described = {"settings": settings.to_json(), "data": pictures.digest}
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        encoded = out / f"{pictures.digest[:12]}-{LATENTS}"
        if encoded.exists() and not (work / LATENTS).exists():
            os.link(encoded, work / LATENTS)
        reporting = Reporting(
            work,
            prompts_of_model(JUDGED_MODEL, 2),
            tell=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
        )
        compress(load_checkpoint(JUDGED_MODEL), pictures, settings, out=folder, reporting=reporting)
        if not encoded.exists():
            os.link(work / LATENTS, encoded)
        (work / "made-with.json").write_text(json.dumps(described))
    if json.loads((work / "made-with.json").read_text()) != json.loads(json.dumps(described)):
        raise SystemExit(f"{folder} was made with other settings or data: remove it, or name another --out")
    return folder, json.loads((folder / JSON_FILE).read_text())


def exported(model: str, folder: Path, loras: tuple[str, ...] = ()) -> Path:
    """A bundle of a model in float32 for the target cpu, made now or in an earlier call.

    Args:
        model: as `sdc export --model` takes it.
        folder: of the bundle.
        loras: FILE:SCALE each.
    """
    source = Source(model, loras=loras)
    export_bundle(ExportRequest(source, PrecisionRequest("fp32"), parse_targets("cpu"), folder))
    return folder
