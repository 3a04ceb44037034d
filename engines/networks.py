"""The pipeline's networks: engines that are loaded when they are first needed, and whose outputs are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdc.engines.denoise import Latents, Predict
from sdc.engines.errors import NumericalError
from sdc.engines.generation import largest_batch
from sdc.engines.load_ahead import LoadAhead
from sdc.engines.session import Session
from sdc.engines.specs import SHALLOW, ComponentSpec
from sdc.engines.tiles import decode_in_tiles
from sdc.engines.unet import Feeds, PreparedUnet
from sdc.engines.wiring import changes_with_timestep, depends_on_timestep_only, hoisted_parts, input_shapes


@dataclass(frozen=True)
class DenoisingStep:
    """One call of the UNet, as it is reported.

    Attributes:
        index: of the step, from 0.
        count: steps in all.
        timestep: in training steps.
        feeds: what the UNet's engine got, by input name.
        output: what it gave: its raw prediction, before guidance.
        seconds: the time that the engine took; the first time, that for getting ready for the size too.
        component: the engine: the UNet's, or with DeepCache the shallow one's.
    """

    index: int
    count: int
    timestep: float
    feeds: Feeds
    output: Latents
    seconds: float
    component: str


_MOST_TIMESTEPS = 200
"""What is prepared for each takes 0.1 MB in Stable Diffusion 1.5."""

OnStep = Callable[[DenoisingStep], None]


class Networks:
    """A bundle's engines on demand; loaded ones stay loaded until they are released. Not thread-safe.

    Args:
        specs: the interface of every component.
        load_session: loads the engine of a component.
    """

    def __init__(self, specs: Mapping[str, ComponentSpec], load_session: Callable[[str], Session]) -> None:
        self.specs = specs
        self._load_session = load_session
        self._sessions: dict[str, Session] = {}
        self._ahead = LoadAhead(load_session)
        self._rows: dict[float, Feeds] = {}

    def session(self, component: str) -> Session:
        """The engine of a component, loaded if it is not yet."""
        if component not in self._sessions:
            self._sessions[component] = self._ahead.take(component) or self._load_session(component)
        return self._sessions[component]

    def load_unet_ahead(self, samples: Iterable[Sequence[int]], *, waits: bool = False) -> None:
        """Begin to load the UNet's engine in another thread, if it is not loaded; `session` waits for it.

        Meanwhile other engines may be loaded and run. What fails is raised where the engine is asked for.

        Args:
            samples: shapes of the samples that it will be run on, for which it is made ready.
            waits: whether it takes the memory of its weights only when other engines have been released, or it is
                asked for; `release` or `give_up_waiting` has to come.
        """
        if "unet" not in self._sessions:
            distinct = sorted({tuple(sample) for sample in samples})
            self._ahead.begin("unet", [input_shapes(self.specs["unet"], sample) for sample in distinct], waits=waits)

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, 77], int64, to the text encoder's last hidden states, [N, 77, D], float32."""
        return self._run_in_parts("text_encoder", {"input_ids": input_ids})["last_hidden_state"]

    def decode_latents(
        self, latents: Latents, *, at_once: int | None = None, tile: tuple[int, int] | None = None, scale: int = 1
    ) -> NDArray[np.float32]:
        """Latents divided by the scaling factor, [N, C, H, W], to pictures, [N, 3, F H, F W], float32.

        Args:
            latents: of any number of pictures.
            at_once: pictures for each run of the decoder; as many as it takes if None.
            tile: height and width, in latents, of the tiles that pictures are decoded in; None decodes them whole.
            scale: F, pixels for each latent; needed for tiles.
        """

        def decode(rows: Latents) -> NDArray[np.float32]:
            return self._run_in_parts("vae_decoder", {"latent_sample": rows}, at_once=at_once)["sample"]

        return decode(latents) if tile is None else decode_in_tiles(decode, latents, tile, scale=scale)

    def predictor(
        self,
        conditions: Mapping[str, NDArray[np.float32]],
        *,
        steps: int,
        timesteps: Iterable[float] = (),
        fewer_rows: int | None = None,
        full_steps: Container[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Predict:
        """The UNet for one run of a sampler.

        Where work was hoisted out of the UNet, what depends on the conditions alone is computed now, and what depends
        on the timestep once for each distinct one.

        Args:
            conditions: its inputs other than the sample and the timestep, as a UNet takes them that is whole.
            steps: how often it will be called.
            timesteps: those that are known to come; they are prepared now, others when they come.
            fewer_rows: that samples of some calls have, which go with the last conditions; None if all have as many.
            full_steps: indices of the calls that run the whole UNet, the first among them; the shallow one runs at the
                others (DeepCache). None for all.
            on_step: called after every call.

        Returns:
            A function that raises NumericalError where the UNet gives NaN or infinity.
        """
        known = tuple(timesteps)
        if len(self._rows) >= _MOST_TIMESTEPS:
            self._rows.clear()
        for component in ("unet",) if full_steps is None else ("unet", SHALLOW):
            if not self._ahead.is_loading(component):  # else it is waited for when the engines beside it have run
                self.session(component)
        unet = PreparedUnet(
            self.session,
            self.specs,
            self._run_part,
            conditions,
            timesteps=known,
            rows=self._rows,
            fewer_rows=fewer_rows,
            uses_shallow=full_steps is not None,
        )
        if known:
            self._release_what_is_known()
        index = 0

        def predict(sample: Latents, timestep: float) -> Latents:
            nonlocal index
            made = unet.predict(sample, timestep, shallow=full_steps is not None and index not in full_steps)
            _check_finite(made.output, f"{made.component} at step {index + 1} of {steps} (timestep {timestep:g})")
            if on_step is not None:
                on_step(DenoisingStep(index, steps, timestep, made.feeds, made.output, made.seconds, made.component))
            index += 1
            return made.output

        return predict

    def predict(
        self, sample: Latents, timestep: float, conditions: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The UNet's raw prediction for any number of rows, whether or not work was hoisted out of it.

        Args:
            sample: [N, C, H, W], float32, of unit variance.
            timestep: in training steps.
            conditions: as for `predictor`, of N rows.

        Raises:
            NumericalError: the UNet gives NaN or infinity.
        """
        most = largest_batch(self.specs["unet"])
        parts = []
        for begin in range(0, len(sample), most):
            rows = slice(begin, begin + most)
            of_rows = {name: value[rows] for name, value in conditions.items()}
            parts.append(self.predictor(of_rows, steps=1)(sample[rows], timestep))
        return np.concatenate(parts)

    def release(self, *, but: Container[str] = ()) -> None:
        """Release all engines, or all but some; they are loaded again if they are needed again."""
        try:
            self._ahead.release(but=but)
            for component in [name for name in self._sessions if name not in but]:
                self._sessions.pop(component).close()
        finally:
            self._ahead.go_on()

    def give_up_waiting(self) -> None:
        """Release an engine that is loaded ahead and waits for memory: what would free it did not come about."""
        self._ahead.give_up()

    def _release_what_is_known(self) -> None:
        """Release engines that give the same for every picture, as what they give is kept; they may be loaded again."""
        for part in filter(depends_on_timestep_only, hoisted_parts(self.specs)):
            if part.name in self._sessions:
                self._sessions.pop(part.name).close()

    def _run_part(self, part: ComponentSpec, feeds: Feeds) -> Feeds:
        """Run an engine beside the UNet, with no more rows at a time than it takes; a timestep is no row."""
        if changes_with_timestep(part):
            outputs = self.session(part.name).run(feeds)
            _check_all_finite(outputs, part.name)
            return outputs
        return self._run_in_parts(part.name, feeds)

    def _run_in_parts(
        self, component: str, feeds: Feeds, *, at_once: int | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Run a component on as many rows at a time as it takes, or on fewer."""
        session = self.session(component)
        most = min(at_once or math.inf, largest_batch(self.specs[component]))
        count = len(next(iter(feeds.values())))
        if count <= most:
            outputs = session.run(feeds)
            _check_all_finite(outputs, component)
            return outputs
        outputs = {}
        for begin in range(0, count, int(most)):
            rows = slice(begin, begin + int(most))
            part = session.run({name: values[rows] for name, values in feeds.items()})
            _check_all_finite(part, component)
            for name, values in part.items():  # written where they stay: pictures are large
                if name not in outputs:
                    outputs[name] = np.empty((count, *values.shape[1:]), values.dtype)
                outputs[name][rows] = values
        return outputs


def _check_all_finite(outputs: Feeds, component: str) -> None:
    for values in outputs.values():
        _check_finite(values, component)


def _check_finite(values: NDArray[Any], place: str) -> None:
    if not np.isfinite(values).all():
        raise NumericalError(
            f"{place} gave NaN or infinity in {np.count_nonzero(~np.isfinite(values))} of {values.size} values",
            hint="use a bundle of higher precision (fp32), or lower the guidance",
        )
