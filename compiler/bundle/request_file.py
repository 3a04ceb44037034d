"""The file ``request.json`` of a bundle: what was asked for, so that the bundle can be made again with other LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.export_plan import ExportRequest, prompts_of
from sdc.compiler.lora_argument import FoldedLora
from sdc.compiler.precision.planning import AUTO, PrecisionRequest
from sdc.compiler.stages import Opened, Source
from sdc.engines.bundle import Bundle
from sdc.engines.checked_json import JsonValue, read_json
from sdc.engines.errors import InputError
from sdc.engines.targets import parse_targets
from sdc.passes.pipeline import MIXED
from sdc.passes.precision.plan_file import read_plan

Value = TypeVar("Value")

REQUEST_NAME = "request.json"
TABLE_PATH, PLAN_PATH = "calibration/unet.json", "precision/unet.toml"
"""Where a bundle has them."""

TINY = "tiny"
"""The model that ships with sdc, whatever folder of that name there is."""


@dataclass(frozen=True)
class StoredRequest:
    """What a bundle was made from.

    Attributes:
        request: with the bundle's own calibration and plan, without LoRAs; its `out` is the bundle.
        loras: what was folded in, in order.
    """

    request: ExportRequest
    loras: tuple[FoldedLora, ...]


def request_json(request: ExportRequest, opened: Opened) -> dict[str, Any]:
    """Plain JSON values; `read_request` is the inverse."""
    source, calibration, prompts = request.source, request.calibration, prompts_of(request)
    return {
        "model": lasting_name(source.model, opened.entry.source),
        "weights": source.weights,
        "seed": source.seed,
        "config": None if source.config is None else str(source.config.absolute()),
        "checkpoint": dict(opened.base_digests),
        "loras": [asdict(lora) for lora in opened.loras],
        "precision": request.precision.name,
        "targets": [target.name for target in request.targets],
        "fuse": request.fuse,
        "hoist": request.hoist,
        "deepcache": request.deepcache,
        "shards": request.shards,
        "calibration": {
            "method": calibration.method,
            "symmetric": calibration.symmetric,
            "correct_bias": calibration.correct_bias,
            "reduce_range": calibration.reduces_range if request.precision.calibrates else None,
            "prompts": None if prompts is None else list(prompts),
        },
    }


def lasting_name(model: str, source: str) -> str:
    """What finds a model from another working folder: a folder's or a file's absolute path, or what was said."""
    path = Path(model)
    is_path = model != TINY and path.exists() and Path(source) == path
    return str(path.absolute()) if is_path else model


def read_request(bundle: Bundle) -> StoredRequest:
    """What a bundle was made from.

    Raises:
        InputError: it was made by a version of sdc that did not keep this.
        BundleError: the file was changed.
    """
    if REQUEST_NAME not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path} does not say what it was made from: it has no {REQUEST_NAME}",
            hint="export it again with this version of sdc",
        )
    root = read_json(bundle.file(REQUEST_NAME))
    config, calibration = root.member("config"), root.member("calibration")
    precision = _precision(bundle, root.member("precision").text())
    options = CalibrationOptions(
        method=calibration.member("method").text(),
        symmetric=_optional(calibration.member("symmetric"), JsonValue.flag),
        correct_bias=calibration.member("correct_bias").flag(),
        reduce_range=_optional(calibration.member("reduce_range"), JsonValue.flag),
        table_file=bundle.file(TABLE_PATH) if precision.calibrates else None,
    )
    request = ExportRequest(
        source=Source(
            model=root.member("model").text(),
            weights=root.member("weights").text(),
            seed=root.member("seed").integer(0),
            config=None if config.value is None else Path(config.text()),
        ),
        precision=precision,
        targets=parse_targets(",".join(each.text() for each in root.member("targets").elements())),
        out=bundle.path,
        fuse=root.member("fuse").flag(),
        hoist=root.member("hoist").flag(),
        calibration=options,
        deepcache=_optional(root.member("deepcache"), lambda value: value.integer(0)),
        shards=_optional(root.member("shards"), lambda value: value.integer(2)),
        other_weights=True,
        base_digests=_texts(root.member("checkpoint")),
        prompts=_optional(calibration.member("prompts"), lambda value: tuple(each.text() for each in value.elements())),
    )
    return StoredRequest(request, tuple(_read_lora(each) for each in root.member("loras").elements()))


def _precision(bundle: Bundle, name: str) -> PrecisionRequest:
    """A plan that was given or chosen is kept."""
    if name in (MIXED, AUTO):
        return PrecisionRequest(MIXED, read_plan(bundle.file(PLAN_PATH)))
    return PrecisionRequest(name)


def _read_lora(value: JsonValue) -> FoldedLora:
    return FoldedLora(
        file=value.member("file").text(),
        scale=value.member("scale").number(),
        sha256=value.member("sha256").text(),
        few_steps=value.member("few_steps").flag(),
    )


def _texts(value: JsonValue) -> Mapping[str, str]:
    return {name: each.text() for name, each in value.members()}


def _optional(value: JsonValue, read: Callable[[JsonValue], Value]) -> Value | None:
    return None if value.value is None else read(value)
