"""Whether float16 holds every value of a model: found out in float32, from prompt to picture and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdc.compiler.build.built import save_onnx
from sdc.compiler.component import Component
from sdc.engines.errors import NumericalError
from sdc.engines.generation import Generation
from sdc.engines.manifest import PipelineSettings
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule import Schedule
from sdc.engines.session import Run, Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime import RUN_FEW_TIMES, RUN_IN_ORDER
from sdc.engines.specs import TensorSpec
from sdc.engines.targets import ONNXRUNTIME
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.mapped_tensors import release_weights
from sdc.passes.precision.magnitudes import MAGNITUDES, Observed, Overflow, find_overflow, observe_magnitudes


@dataclass(frozen=True)
class HalfCheckSettings:
    """What is drawn, in float32.

    Attributes:
        prompts: one picture each.
        steps: of DDIM; their timesteps are spread over the whole schedule.
        guidance_scale: above 1, the empty prompt runs along.
        latent_size: height and width of the latents.
        seed: noise of the first prompt; the others count up from it.
    """

    prompts: tuple[str, ...]
    latent_size: tuple[int, int]
    steps: int = 4
    guidance_scale: float = 5.0
    seed: int = 0


def find_overflows(
    components: Mapping[str, Component],
    *,
    tokenizer: ClipTokenizer,
    schedule: Schedule,
    settings: PipelineSettings,
    drawn: HalfCheckSettings,
    on_run: Callable[[int, int], None] | None = None,
) -> dict[str, Overflow]:
    """What does not fit into float16, by component; components of which everything does are not in the result.

    The UNet and either half of the VAE are loaded one after the other.

    Args:
        components: text encoder, UNet and VAE in float32, before any precision pass; they are not changed.
        tokenizer: of the model; likewise `schedule` and `settings`.
        drawn: what to draw.
        on_run: progress, in pictures.

    Raises:
        NumericalError: a network gives NaN in float32.
    """
    with ExitStack() as stack:
        recorders: dict[str, _Recorder] = {}

        def load(name: str) -> Session:
            recorders[name] = stack.enter_context(_recording(components[name]))
            return recorders[name]

        pipeline = Pipeline(
            tokenizer=tokenizer,
            schedule=schedule,
            settings=settings,
            specs={name: component.spec for name, component in components.items()},
            load_session=load,
        )
        latents = []
        for index in range(len(drawn.prompts)):
            latents.append(pipeline.denoise(picture_generation(pipeline, drawn, index)))
            if on_run is not None:
                on_run(index + 1, len(drawn.prompts))
        stack.close()  # the text encoder and the UNet go before the VAE comes
        # A result is ONNX Runtime's own memory, and would keep all that the decoder has allocated.
        pictures = [pipeline.decode(each).copy() for each in latents]
        stack.close()
        for each in pictures:
            pipeline.networks.session("vae_encoder").run({"sample": each})
        found = {name: recorder.overflow() for name, recorder in recorders.items()}
    return {name: overflow for name, overflow in found.items() if overflow is not None}


def picture_generation(pipeline: Pipeline, drawn: HalfCheckSettings, index: int) -> Generation:
    """One of the pictures to draw."""
    height, width = (size * pipeline.settings.vae_reduction for size in drawn.latent_size)
    return Generation(
        prompts=(drawn.prompts[index],),
        negative_prompts=("",),
        sampler="ddim",
        steps=drawn.steps,
        guidance_scale=drawn.guidance_scale,
        seeds=(drawn.seed + index,),
        height_px=height,
        width_px=width,
    )


@contextmanager
def _recording(component: Component) -> Iterator[_Recorder]:
    """The network in float32 with the extra output, loaded into a backend."""
    observed = observe_magnitudes(component.model)
    output = TensorSpec(MAGNITUDES, "float32", (len(observed.tensors),))
    spec = replace(component.spec, outputs=(*component.spec.outputs, output))
    with tempfile.TemporaryDirectory(prefix="sdc-half-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(observed.model, path)
        release_weights(observed.model)
        options = {RUN_FEW_TIMES: True, RUN_IN_ORDER: True}
        with open_session(EngineSource(spec, ONNXRUNTIME, (path,), options)) as session:
            yield _Recorder(session, observed)


class _Recorder:
    """Stands in for a session: runs it, keeps the largest magnitudes and hands the rest on."""

    def __init__(self, session: Session, observed: Observed) -> None:
        self.spec = session.spec
        self._session = session
        self._observed = observed
        self._magnitudes = np.zeros(len(observed.tensors), np.float32)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        outputs = self._session.run(feeds)
        magnitudes = outputs.pop(MAGNITUDES)
        if np.isnan(magnitudes).any():
            worst = self._observed.sites[int(np.argmax(np.isnan(magnitudes)))]
            raise NumericalError(f"{self.spec.name}: node {worst!r} gives NaN in float32", hint="check the checkpoint")
        self._magnitudes = np.maximum(self._magnitudes, magnitudes)
        return outputs

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """See `Session.hold`; it always hands everything over."""
        return lambda others: self.run({**feeds, **others})

    def overflow(self) -> Overflow | None:
        """What did not fit so far."""
        return find_overflow(self._observed, self._magnitudes)

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
