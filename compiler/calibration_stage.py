"""The stage `calibrate` of an export: what the activations of the UNet hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.bundle.writer import json_bytes
from sdc.compiler.calibration.table_file import read_table
from sdc.compiler.component import Component
from sdc.compiler.half_stage import open_tokenizer
from sdc.compiler.stages import MODEL_NAME, TABLE_NAME, fused_component
from sdc.engines.errors import InputError, PassError
from sdc.engines.specs import ComponentSpec
from sdc.engines.targets import ONNXRUNTIME
from sdc.passes.precision.calibration_table import CalibrationTable, check_digest
from sdc.passes.precision.other_weights import table_for
from sdc.passes.precision.smoothing_rule import SmoothingRule


@dataclass(frozen=True)
class Calibration:
    """Input of the stage `calibrate`.

    Attributes:
        model: name of the model; prompts are chosen by it.
        unet: interface of the UNet; likewise `text_encoder`.
        unet_folder: where the stage `export` left it; likewise `text_encoder_folder`.
        configs: full configurations of the networks.
        files: as in `Opened`.
        prompts: None for the model's own.
        steps: of each picture; None for what suits the network's size. Likewise `size_px`.
        timesteps: how many of the steps are kept; None for all.
        fuse: as for the engines.
        smoothing: of SmoothQuant; None leaves the graph as it is.
        table: an earlier calibration to use instead of a new one.
        other_weights: whether that may be of the same layers with other weights.
    """

    model: str
    unet: ComponentSpec
    unet_folder: Path
    text_encoder: ComponentSpec
    text_encoder_folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bytes]
    prompts: tuple[str, ...] | None
    fuse: bool
    smoothing: SmoothingRule | None = None
    table: Path | None = None
    other_weights: bool = False
    steps: int | None = None
    size_px: int | None = None
    timesteps: int | None = None


def calibrate_stage(inputs: Calibration, folder: Path, report: Callable[[int, int], None]) -> Any:
    """Stage `calibrate`: what the fused float32 UNet's activations hold, over real denoising runs.

    Raises:
        InputError: the table that is given belongs to another graph.
    """
    unet, _ = fused_component(inputs.unet, inputs.unet_folder, inputs.fuse)
    table = _measured(inputs, unet, report) if inputs.table is None else _given(inputs, inputs.table, unet)
    (folder / TABLE_NAME).write_bytes(json_bytes(table.to_json()))
    return {"prompts": len(table.prompts), "timesteps": len(table.timesteps), "tensors": len(table.tensors)}


def _given(inputs: Calibration, file: Path, unet: Component) -> CalibrationTable:
    table = read_table(file)
    if inputs.other_weights:
        return table_for(unet.model, table)
    try:
        check_digest(unet.model, table.source_digest)
    except PassError as error:
        raise InputError(f"{file}: {error}", hint="leave out --calibration-table") from error
    return table


def _measured(inputs: Calibration, unet: Component, report: Callable[[int, int], None]) -> CalibrationTable:
    from sdc.compiler.calibration.calibrate import Surroundings, calibrate
    from sdc.compiler.calibration.prompts import prompts_for
    from sdc.compiler.calibration.settings import chosen_settings
    from sdc.compiler.trace.interfaces import pipeline_settings
    from sdc.engines.schedule_config import schedule_from_config
    from sdc.engines.sessions import EngineSource, open_session

    settings = pipeline_settings(inputs.configs)
    text_encoder = EngineSource(inputs.text_encoder, ONNXRUNTIME, (inputs.text_encoder_folder / MODEL_NAME,))
    with open_session(text_encoder) as session:
        surroundings = Surroundings(
            tokenizer=open_tokenizer(inputs.files, inputs.configs),
            text_encoder=session,
            schedule=schedule_from_config(json.loads(inputs.files["scheduler/scheduler_config.json"])),
            settings=settings,
        )
        prompts = inputs.prompts or prompts_for(inputs.model)
        chosen = chosen_settings(
            unet,
            settings,
            prompts,
            all_prompts=inputs.prompts is not None,
            steps=inputs.steps,
            size_px=inputs.size_px,
            timesteps=inputs.timesteps,
        )
        return calibrate(unet, surroundings, chosen, smoothing=inputs.smoothing, on_run=report)
