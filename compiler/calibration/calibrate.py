"""What a UNet's activations hold, from real denoising runs over prompts and every timestep of a sampler.

The fused float32 graph runs with small extra outputs: each channel's extremes and mean, and an even part of the values
of every tensor that could be quantised; the sampler is the runtime's own. One pass fills histograms of a fixed size, so
memory is that of one run and does not grow with the samples.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from sdc.compiler.build.built import save_onnx
from sdc.compiler.calibration.recorder import Recorder
from sdc.compiler.calibration.settings import CalibrationSettings
from sdc.compiler.component import Component
from sdc.engines.generation import Generation
from sdc.engines.manifest import PipelineSettings
from sdc.engines.pipeline import Pipeline
from sdc.engines.samplers.ddim import plan_ddim_through
from sdc.engines.schedule import Schedule
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime import RUN_IN_ORDER
from sdc.engines.specs import TensorSpec
from sdc.engines.targets import ONNXRUNTIME
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.base import run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.mapped_tensors import release_weights
from sdc.passes.precision.calibration_table import CalibrationTable, Smoothing
from sdc.passes.precision.observe_activations import MAXIMA, MEANS, MINIMA, ObserveActivations, Observed, samples_name
from sdc.passes.precision.quantisation import Kind, find_layers
from sdc.passes.precision.smooth_quant import smooth
from sdc.passes.precision.smoothing_rule import SmoothingRule
from sdc.passes.precision.timestep_drift import choose_timesteps, relative_magnitudes
from sdc.passes.simplify.inline_functions import InlineFunctions

log = logging.getLogger(__name__)

_SAMPLER = "ddim"

OnRun = Callable[[int, int], None]
"""Called with the number of UNet calls done, and of all."""


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


def calibrate(
    unet: Component,
    surroundings: Surroundings,
    settings: CalibrationSettings,
    *,
    smoothing: SmoothingRule | None = None,
    on_run: OnRun | None = None,
) -> CalibrationTable:
    """Measure every activation that a layer reads, at every timestep or at those chosen by the drift of ranges.

    The same arguments give the same table, up to the floating-point order of the processor that ran it.

    Args:
        unet: the fused graph in float32, before any precision pass; it is not changed.
        surroundings: the rest of the pipeline.
        settings: what to denoise.
        smoothing: of SmoothQuant: one batch of prompts tells the channels' magnitudes, and what is measured is the
            smoothed graph. None measures the graph as it is.
        on_run: progress.

    Raises:
        InputError: the schedule has fewer steps than asked for.
        NumericalError: the network gave NaN or infinity.
        PassError: the network has no layer to calibrate.
    """
    if smoothing is None and settings.timesteps is None:
        return _measure(unet, surroundings, settings, None, _Progress(on_run, settings.runs))
    scouting = settings.scouting
    progress = _Progress(on_run, scouting.runs + settings.runs)
    seen = _measure(unet, surroundings, scouting, None, progress)
    timesteps = None if settings.timesteps is None else _chosen_timesteps(seen, settings.timesteps)
    if smoothing is None:
        return _measure(unet, surroundings, settings, timesteps, progress)
    magnitudes = {name: tuple(each.channel_magnitudes.tolist()) for name, each in seen.tensors.items()}
    smoothed = Component(unet.spec, unet.model.clone())
    found = smooth(smoothed.model, Smoothing(seen.graph_digest, smoothing, magnitudes))
    return replace(_measure(smoothed, surroundings, settings, timesteps, progress), smoothing=found)


def _chosen_timesteps(seen: CalibrationTable, count: int) -> tuple[int, ...]:
    """From the noisiest on, which is one of them: pictures start there."""
    chosen = choose_timesteps(relative_magnitudes(seen), count, always=(0,))
    return tuple(int(seen.timesteps[index]) for index in chosen)


class _Progress:
    """Counts the runs of several measurements."""

    def __init__(self, on_run: OnRun | None, runs: int) -> None:
        self._on_run = on_run
        self._runs = runs
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._on_run is not None:
            self._on_run(self._done, self._runs)


def _measure(
    unet: Component,
    surroundings: Surroundings,
    settings: CalibrationSettings,
    timesteps: tuple[int, ...] | None,
    progress: Callable[[], None],
) -> CalibrationTable:
    tensors = observed_tensors(unet.model)
    with _observing_session(unet, tensors) as session:
        recorder = Recorder(session, tensors, progress)
        _denoise_all(recorder, surroundings, settings, timesteps)
    log.info(
        "calibrated %d tensors over %d timesteps and %d prompts",
        len(tensors),
        len(recorder.timesteps),
        len(settings.prompts),
    )
    return CalibrationTable(
        graph_digest=digest_from_model(unet.model),
        prompts=settings.prompts,
        seed=settings.seed,
        sampler=_SAMPLER,
        steps=settings.steps if timesteps is None else len(timesteps),
        guidance_scale=settings.guidance_scale,
        latent_size=settings.latent_size,
        timesteps=recorder.timesteps,
        tensors=recorder.statistics(),
        results=recorder.channel_ranges(),
    )


def observed_tensors(model: ir.Model) -> tuple[Observed, ...]:
    """What the layers of a graph read, each tensor once, in the order of the graph; and what convolutions write."""
    layers, _ = find_layers(model)
    found = {layer.activation.name or "": layer for layer in reversed(layers)}
    read = tuple(Observed(name, layer.channels, layer.spatial_axes) for name, layer in reversed(found.items()))
    convolutions = [layer for layer in layers if layer.node.op_type == Kind.CONV]
    written = {layer.node.outputs[0].name or "": layer for layer in convolutions}
    return read + tuple(
        Observed(name, layer.weight_shape[layer.output_axis], layer.spatial_axes, sampled=False)
        for name, layer in written.items()
        if name not in found
    )


@contextmanager
def _observing_session(unet: Component, tensors: tuple[Observed, ...]) -> Iterator[Session]:
    """The network in float32 with the extra outputs, loaded into a backend."""
    observed = unet.model.clone()
    run_passes([InlineFunctions(fused=True), ObserveActivations(tensors)], observed)
    channels = sum(each.channels for each in tensors)
    extra = [TensorSpec(name, "float32", (channels,)) for name in (MINIMA, MAXIMA, MEANS)]
    sampled = [index for index, each in enumerate(tensors) if each.sampled]
    extra += [TensorSpec(samples_name(index), "float32", (f"N{index}",)) for index in sampled]
    spec = replace(unet.spec, outputs=(*unet.spec.outputs, *extra))
    with tempfile.TemporaryDirectory(prefix="sdc-calibrate-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(observed, path)
        release_weights(observed)
        with open_session(EngineSource(spec, ONNXRUNTIME, (path,), {RUN_IN_ORDER: True})) as session:
            yield session


def _denoise_all(
    unet: Session, surroundings: Surroundings, settings: CalibrationSettings, timesteps: tuple[int, ...] | None
) -> None:
    sessions = {"unet": unet, "text_encoder": surroundings.text_encoder}
    pipeline = Pipeline(
        tokenizer=surroundings.tokenizer,
        schedule=surroundings.schedule,
        settings=surroundings.settings,
        specs={name: session.spec for name, session in sessions.items()},
        load_session=sessions.__getitem__,
    )
    trajectory = None if timesteps is None else plan_ddim_through(surroundings.schedule, timesteps)
    height, width = (size * surroundings.settings.vae_reduction for size in settings.latent_size)
    for begin in range(0, len(settings.prompts), settings.batch):
        prompts = settings.prompts[begin : begin + settings.batch]
        pipeline.denoise(
            Generation(
                prompts=prompts,
                negative_prompts=("",) * len(prompts),
                sampler=_SAMPLER,
                steps=settings.steps if timesteps is None else len(timesteps),
                guidance_scale=settings.guidance_scale,
                seeds=tuple(settings.seed + begin + index for index in range(len(prompts))),
                height_px=height,
                width_px=width,
            ),
            trajectory=trajectory,
        )
