"""The pipeline's networks: engines that are loaded when they are first needed, and whose outputs are checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdc.engines.denoise import Latents, Predict
from sdc.engines.errors import NumericalError
from sdc.engines.generation import largest_batch
from sdc.engines.session import Session
from sdc.engines.specs import ComponentSpec


@dataclass(frozen=True)
class DenoisingStep:
    """One call of the UNet, as it is reported.

    Attributes:
        index: of the step, from 0.
        count: steps in all.
        timestep: in training steps.
        feeds: what the UNet got, by input name.
        output: what it gave: its raw prediction, before guidance.
        seconds: the time that the engine took.
    """

    index: int
    count: int
    timestep: float
    feeds: Mapping[str, NDArray[np.generic]]
    output: Latents
    seconds: float


OnStep = Callable[[DenoisingStep], None]


class Networks:
    """A bundle's engines on demand; loaded ones stay loaded until `close`. Not thread-safe.

    Args:
        specs: the interface of every component.
        load_session: loads the engine of a component.
    """

    def __init__(self, specs: Mapping[str, ComponentSpec], load_session: Callable[[str], Session]) -> None:
        self.specs = specs
        self._load_session = load_session
        self._sessions: dict[str, Session] = {}

    def session(self, component: str) -> Session:
        """The engine of a component, loaded if it is not yet."""
        if component not in self._sessions:
            self._sessions[component] = self._load_session(component)
        return self._sessions[component]

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, 77], int64, to the text encoder's last hidden states, [N, 77, D], float32."""
        return self._run_in_parts("text_encoder", "input_ids", input_ids, "last_hidden_state")

    def decode_latents(self, latents: Latents) -> NDArray[np.float32]:
        """Latents divided by the scaling factor, [N, C, H/F, W/F], to pictures, [N, 3, H, W], float32."""
        return self._run_in_parts("vae_decoder", "latent_sample", latents, "sample")

    def predictor(
        self, conditions: Mapping[str, NDArray[np.float32]], *, steps: int, on_step: OnStep | None = None
    ) -> Predict:
        """The UNet for one run of a sampler.

        Args:
            conditions: its inputs other than the sample and the timestep.
            steps: how often it will be called.
            on_step: called after every call.

        Returns:
            A function that raises NumericalError where the UNet gives NaN or infinity.
        """
        session = self.session("unet")
        index = 0

        def predict(sample: Latents, timestep: float) -> Latents:
            nonlocal index
            feeds = {"sample": sample, "timestep": np.array([timestep], np.float32), **conditions}
            begin = time.perf_counter()
            output = session.run(feeds)["out_sample"]
            seconds = time.perf_counter() - begin
            _check_finite(output, f"unet at step {index + 1} of {steps} (timestep {timestep:g})")
            if on_step is not None:
                on_step(DenoisingStep(index, steps, timestep, feeds, output, seconds))
            index += 1
            return output

        return predict

    def close(self) -> None:
        """Release all engines; may be called twice. They are loaded again if they are needed again."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def _run_in_parts(self, component: str, feed: str, rows: NDArray[np.generic], output: str) -> NDArray[np.float32]:
        """Run a component on as many rows at a time as it takes."""
        session = self.session(component)
        most = largest_batch(self.specs[component])
        parts = [session.run({feed: rows[i : i + most]})[output] for i in range(0, len(rows), most)]
        result = np.concatenate(parts)
        _check_finite(result, component)
        return result


def _check_finite(values: NDArray[np.float32], place: str) -> None:
    if not np.isfinite(values).all():
        raise NumericalError(
            f"{place} gave NaN or infinity in {np.count_nonzero(~np.isfinite(values))} of {values.size} values",
            hint="use a bundle of higher precision (fp32), or lower the guidance",
        )
