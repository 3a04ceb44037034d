"""The stage `check-fp16` of an export: what float16 does not hold, before any engine is built in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdc.compiler.bundle.writer import json_bytes
from sdc.compiler.stages import fused_component
from sdc.engines.manifest import PipelineSettings
from sdc.engines.specs import ComponentSpec
from sdc.engines.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from sdc.compiler.precision.half_safety import HalfCheckSettings

OVERFLOWS_NAME = "fp16.json"
"""What the stage leaves in its folder: an `Overflow` by component."""

_PROMPTS = 1
_STEPS = 4
"""A second picture would take SD 1.5's export beyond two minutes on two cores.

`LIMIT` leaves a factor of two for prompts, seeds, timesteps and sizes that are not seen; whether that is enough was not
measured on SD 1.5's trained weights.
"""

_LARGEST_SIZE = 32
"""Of latents, for time and memory."""


@dataclass(frozen=True)
class HalfCheck:
    """Input of the stage.

    Attributes:
        model: name of the model; prompts are chosen by it.
        specs: interface of each component.
        folders: where the stage `export` left each.
        configs: full configurations of the networks.
        files: of the bundle, by path.
        prompts: None for the model's own.
        fuse: as for the engines.
    """

    model: str
    specs: Mapping[str, ComponentSpec]
    folders: Mapping[str, Path]
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bytes]
    prompts: tuple[str, ...] | None
    fuse: bool


def check_half_stage(inputs: HalfCheck, folder: Path, report: Callable[[int, int], None]) -> Any:
    """Draw a picture in float32, and note which nodes write values that float16 does not hold."""
    from sdc.compiler.precision.half_safety import find_overflows
    from sdc.engines.schedule_config import schedule_from_config

    components = {
        name: fused_component(spec, inputs.folders[name], inputs.fuse)[0] for name, spec in inputs.specs.items()
    }
    settings, drawn = draw_settings(inputs, pictures=_PROMPTS, steps=_STEPS)
    found = find_overflows(
        components,
        tokenizer=open_tokenizer(inputs.files, inputs.configs),
        schedule=schedule_from_config(json.loads(inputs.files["scheduler/scheduler_config.json"])),
        settings=settings,
        drawn=drawn,
        on_run=report,
    )
    values = {name: asdict(overflow) for name, overflow in found.items()}
    (folder / OVERFLOWS_NAME).write_bytes(json_bytes(values))
    return json.loads(json.dumps(values))


def islands_of(overflows: Path) -> dict[str, frozenset[str]]:
    """Nodes that stay in float32, by component, from the file that the stage leaves."""
    found = json.loads(overflows.read_text(encoding="utf-8"))
    return {name: frozenset(each["float32"]) for name, each in found.items()}


def open_tokenizer(files: Mapping[str, bytes], configs: Mapping[str, Mapping[str, Any]]) -> ClipTokenizer:
    """The model's tokenizer, of `Opened.files` and the configurations of the networks."""
    from sdc.compiler.trace.interfaces import pipeline_settings
    from sdc.engines.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="sdc-tokenizer-") as folder:
        for name, content in files.items():
            if name.startswith("tokenizer/"):
                Path(folder, Path(name).name).write_bytes(content)
        return load_tokenizer(Path(folder), max_tokens=pipeline_settings(configs).max_tokens)


def draw_settings(
    inputs: HalfCheck, *, pictures: int, steps: int, seed: int = 0
) -> tuple[PipelineSettings, HalfCheckSettings]:
    """What surrounds the networks, and what to draw with them; prompts come again with other noise if they are few."""
    from sdc.compiler.calibration.prompts import prompts_for
    from sdc.compiler.precision.half_safety import HalfCheckSettings
    from sdc.compiler.trace.interfaces import pipeline_settings

    settings = pipeline_settings(inputs.configs)
    unet = inputs.specs["unet"]
    pixels = {"H": settings.default_height_px, "W": settings.default_width_px}
    height, width = (_size(unet, symbol, size // settings.vae_reduction) for symbol, size in pixels.items())
    prompts = tuple(islice(cycle(inputs.prompts or prompts_for(inputs.model)), pictures))
    return settings, HalfCheckSettings(prompts=prompts, latent_size=(height, width), steps=steps, seed=seed)


def _size(spec: ComponentSpec, symbol: str, size: int) -> int:
    """The model's own size, or as far below it as the component's range allows down to the largest one looked at."""
    allowed = spec.dimensions.get(symbol)
    if allowed is None or size <= _LARGEST_SIZE:
        return size
    wanted = max(_LARGEST_SIZE, allowed.minimum)
    return wanted - wanted % allowed.multiple or allowed.multiple
