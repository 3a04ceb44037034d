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
    made_with = work / "made-with.json"
    described = json.dumps({"settings": settings.to_json(), "data": pictures.digest})
    if folder.exists() and not (made_with.exists() and made_with.read_text() == described):
        raise SystemExit(f"{folder} was made with other settings or data: remove it, or name another --out")
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
        made_with.write_text(described)
        compress(load_checkpoint(JUDGED_MODEL), pictures, settings, out=folder, reporting=reporting)
        if not encoded.exists():
            os.link(work / LATENTS, encoded)
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
