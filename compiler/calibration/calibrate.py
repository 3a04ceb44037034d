"""Ranges of a UNet's activations, from real denoising runs over prompts and every timestep of a sampler.

The fused float32 graph runs with one extra output, the largest magnitude of every tensor that could be quantised; the
sampler is the runtime's own. Memory is that of one run: it grows neither with the samples nor with the tensors.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdc.compiler.build.built import save_onnx
from sdc.compiler.component import Component
from sdc.engines.errors import InputError, NumericalError
from sdc.engines.generation import Generation
from sdc.engines.manifest import PipelineSettings
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule import Schedule
from sdc.engines.session import Run, Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import ONNXRUNTIME
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.macs import count_macs
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.observe_maxima import MAXIMA, ObserveMaxima
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.simplify.inline_functions import InlineFunctions

__all__ = ["CalibrationSettings", "CalibrationTable", "Surroundings", "calibrate", "default_settings"]

log = logging.getLogger(__name__)

_SAMPLER = "ddim"

_BACKEND = ONNXRUNTIME

_SMALL_MACS = 2_000_000_000
"""Multiply-adds of one picture below which a network counts as small."""

OnRun = Callable[[int, int], None]
"""Called with the number of UNet calls done, and of all."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What to denoise.

    Attributes:
        prompts: one picture each.
        steps: of DDIM; their timesteps are spread over the whole schedule.
        guidance_scale: above 1, the empty prompt runs along, as it does in use.
        seed: noise of the first prompt; the others count up from it.
        latent_size: height and width of the latents.
        batch: prompts at a time; it changes memory and time, not the ranges.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0
    latent_size: tuple[int, int] = (64, 64)
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("no prompts to calibrate with", hint="give at least one")


@dataclass(frozen=True)
class Surroundings:
    """What stands around the UNet in a pipeline.

    Attributes:
        tokenizer: prompts to token ids.
        text_encoder: a loaded text encoder, in float32; it stays the caller's.
        schedule: the model's noise schedule.
        settings: as in the bundle's manifest.
    """

    tokenizer: ClipTokenizer
    text_encoder: Session
    schedule: Schedule
    settings: PipelineSettings


def default_settings(
    unet: Component, pipeline: PipelineSettings, prompts: tuple[str, ...], *, all_prompts: bool = False
) -> CalibrationSettings:
    """Settings that take a minute or two on two cores, whatever the size of the network.

    A small network runs all prompts in 20 steps at the model's own size. A large one runs 4 prompts in 10 steps at
    half the size, 32x32 latents at most: what an activation ranges over depends on the timestep and the prompt far more
    than on the size of the picture.

    Args:
        unet: the network to calibrate.
        pipeline: as in the bundle's manifest.
        prompts: to choose from.
        all_prompts: a large network runs all of them too.
    """
    height, width = (
        size_px // pipeline.vae_reduction for size_px in (pipeline.default_height_px, pipeline.default_width_px)
    )
    sizes = {"B": 1, "H": height, "W": width}
    if count_macs(unet.model, sizes).total < _SMALL_MACS:
        return CalibrationSettings(prompts, latent_size=(height, width), batch=_largest_batch(unet.spec))
    reduced = (_reduced_size(unet.spec, "H", height), _reduced_size(unet.spec, "W", width))
    return CalibrationSettings(prompts if all_prompts else prompts[:4], steps=10, latent_size=reduced)


def _largest_batch(spec: ComponentSpec) -> int:
    """Prompts at a time; guidance doubles the rows."""
    allowed = spec.dimensions.get("B")
    return 1 if allowed is None else max(1, min(8, allowed.maximum // 2))


def _reduced_size(spec: ComponentSpec, symbol: str, size: int) -> int:
    """Half the size, 32 at most, as far as the component's range allows."""
    allowed = spec.dimensions.get(symbol)
    if allowed is None:
        return size
    wanted = max(min(size // 2, 32), allowed.minimum)
    return wanted - wanted % allowed.multiple or allowed.multiple


def calibrate(
    unet: Component, surroundings: Surroundings, settings: CalibrationSettings, *, on_run: OnRun | None = None
) -> CalibrationTable:
    """Measure the range of every activation that a layer reads, at every timestep.

    The same arguments give the same table, up to the floating-point order of the processor that ran it.

    Args:
        unet: the fused graph in float32, before any precision pass; it is not changed.
        surroundings: the rest of the pipeline.
        settings: what to denoise.
        on_run: progress.

    Raises:
        InputError: the schedule has fewer steps than asked for.
        NumericalError: the network gave NaN or infinity.
        PassError: the network has no layer to calibrate.
    """
    digest = digest_from_model(unet.model)
    layers, _ = find_layers(unet.model)
    tensors = tuple(dict.fromkeys(layer.activation.name or "" for layer in layers))
    with _observing_session(unet, tensors) as session:
        recorder = _Recorder(
            session, tensors, on_run, runs=settings.steps * -(-len(settings.prompts) // settings.batch)
        )
        _denoise_all(recorder, surroundings, settings)
    timesteps, maxima = recorder.rows()
    ranges = maxima.max(axis=0)
    log.info(
        "calibrated %d tensors over %d timesteps and %d prompts", len(tensors), len(timesteps), len(settings.prompts)
    )
    return CalibrationTable(
        graph_digest=digest,
        method="max",
        prompts=settings.prompts,
        seed=settings.seed,
        sampler=_SAMPLER,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        latent_size=settings.latent_size,
        timesteps=timesteps,
        maxima={name: tuple(map(float, maxima[:, index])) for index, name in enumerate(tensors)},
        ranges={name: float(ranges[index]) for index, name in enumerate(tensors)},
    )


@contextmanager
def _observing_session(unet: Component, tensors: tuple[str, ...]) -> Iterator[Session]:
    """The network in float32 with the extra output, loaded into a backend."""
    observed = unet.model.clone()
    run_passes([InlineFunctions(fused=True), ObserveMaxima(tensors)], observed)
    spec = replace(unet.spec, outputs=(*unet.spec.outputs, TensorSpec(MAXIMA, "float32", (len(tensors),))))
    with tempfile.TemporaryDirectory(prefix="sdc-calibrate-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(observed, path)
        _release_mapped_weights(observed)
        with open_session(EngineSource(spec, _BACKEND, (path,), {"inference_precision": "f32"})) as session:
            yield session


def _release_mapped_weights(model: ir.Model) -> None:
    """Give back the pages of weights that are mapped from files; they are mapped again when they are next read."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


class _Recorder:
    """Stands in for the UNet's session: runs it, keeps the maxima by timestep and hands the rest on."""

    def __init__(self, session: Session, tensors: tuple[str, ...], on_run: OnRun | None, *, runs: int) -> None:
        self.spec = session.spec
        self._session = session
        self._tensors = tensors
        self._on_run = on_run
        self._runs = runs
        self._done = 0
        self._maxima: dict[float, NDArray[np.float32]] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        outputs = self._session.run(feeds)
        maxima = outputs.pop(MAXIMA)
        timestep = float(feeds["timestep"].flat[0])
        if not np.isfinite(maxima).all():
            worst = self._tensors[int(np.argmax(~np.isfinite(maxima)))]
            raise NumericalError(
                f"tensor {worst!r} holds NaN or infinity at timestep {timestep:g}, in float32",
                hint="check the checkpoint",
            )
        self._maxima[timestep] = np.maximum(self._maxima.get(timestep, maxima), maxima)
        self._done += 1
        if self._on_run is not None:
            self._on_run(self._done, self._runs)
        return outputs

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """See `Session.hold`; it always hands everything over."""
        return lambda others: self.run({**feeds, **others})

    def rows(self) -> tuple[tuple[float, ...], NDArray[np.float32]]:
        """Timesteps in the order of a run, and the maxima: [timesteps, tensors], float32."""
        return tuple(self._maxima), np.stack(list(self._maxima.values()))

    @property
    def memory_bytes(self) -> int:
        """As the session that it stands for."""
        return self._session.memory_bytes

    def close(self) -> None:
        """Leaves the session to its owner."""

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _denoise_all(unet: Session, surroundings: Surroundings, settings: CalibrationSettings) -> None:
    sessions = {"unet": unet, "text_encoder": surroundings.text_encoder}
    pipeline = Pipeline(
        tokenizer=surroundings.tokenizer,
        schedule=surroundings.schedule,
        settings=surroundings.settings,
        specs={name: session.spec for name, session in sessions.items()},
        load_session=sessions.__getitem__,
    )
    height, width = (size * surroundings.settings.vae_reduction for size in settings.latent_size)
    for begin in range(0, len(settings.prompts), settings.batch):
        prompts = settings.prompts[begin : begin + settings.batch]
        pipeline.denoise(
            Generation(
                prompts=prompts,
                negative_prompts=("",) * len(prompts),
                sampler=_SAMPLER,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                seeds=tuple(settings.seed + begin + index for index in range(len(prompts))),
                height_px=height,
                width_px=width,
            )
        )
