"""The UNet of one run of a sampler: what does not change between steps is computed before the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdc.engines.denoise import Latents
from sdc.engines.errors import InputError
from sdc.engines.session import Run, Session
from sdc.engines.specs import SHALLOW, ComponentSpec
from sdc.engines.wiring import (
    PREDICTION,
    SAMPLE,
    TIMESTEP,
    cached_tensors,
    changes_with_timestep,
    depends_on_timestep_only,
    hoisted_parts,
)

Feeds = Mapping[str, NDArray[np.generic]]

RunPart = Callable[[ComponentSpec, Feeds], Feeds]
"""(an engine beside the UNet, what it takes) -> what it gives."""


@dataclass(frozen=True)
class Prediction:
    """One call of the UNet.

    Attributes:
        component: the engine that ran: the whole UNet's or the shallow one's.
        feeds: all that it got, by input name.
        output: what it gave: its raw prediction.
        seconds: the time that the engine took.
    """

    component: str
    feeds: Feeds
    output: Latents
    seconds: float


@dataclass(frozen=True)
class _HeldStep:
    """A UNet's engine with what it is held with: feeds of so many rows."""

    held: Feeds
    run: Run


class PreparedUnet:
    """A UNet with its conditions, whether or not work was hoisted out of it.

    Args:
        open_session: gives its engine, or that of the shallow UNet, by name; called when all engines beside it have run
            on what is known, as it may be on its way in another thread until then.
        specs: interfaces of it and of the engines beside it.
        run_part: runs one of these.
        conditions: its inputs other than the sample and the timestep, as a classic UNet takes them.
        timesteps: those that are known to come; another one is prepared when it comes.
        rows: what earlier runs with the same engines prepared, by timestep; added to. Left alone where that depends on
            more than the timestep.
        fewer_rows: that samples of some calls have; they go with the last rows of the conditions. None if all have as
            many.
        uses_shallow: whether there will be calls of the shallow UNet, for DeepCache.
    """

    def __init__(
        self,
        open_session: Callable[[str], Session],
        specs: Mapping[str, ComponentSpec],
        run_part: RunPart,
        conditions: Feeds,
        *,
        timesteps: Iterable[float],
        rows: dict[float, Feeds],
        fewer_rows: int | None = None,
        uses_shallow: bool = False,
    ) -> None:
        self._inputs = {tensor.name for tensor in specs["unet"].inputs}
        self._conditions = conditions
        self._run_part = run_part
        parts = hoisted_parts(specs)
        self._timestep_parts = [part for part in parts if changes_with_timestep(part)]
        taken = {tensor.name for part in (specs["unet"], *parts) for tensor in part.inputs}
        held = {name: value for name, value in conditions.items() if name in self._inputs or name not in taken}
        for part in parts:
            if not changes_with_timestep(part):
                held |= self._run(part, conditions)
        self._rows = rows if all(map(depends_on_timestep_only, self._timestep_parts)) else {}
        for timestep in timesteps:
            self._rows_of(timestep)
        session = open_session("unet")
        self._whole = _HeldStep(held, session.hold(held))
        self._fewer_rows = fewer_rows
        self._fewer: _HeldStep | None = None
        if fewer_rows is not None:
            of_fewer = _last_rows(held, fewer_rows)
            self._fewer = _HeldStep(of_fewer, session.hold(of_fewer))
        self._shallow: _ShallowUnet | None = None
        if uses_shallow:
            self._shallow = _ShallowUnet(open_session(SHALLOW), specs["unet"], held, fewer_rows)

    def predict(self, sample: Latents, timestep: float, *, shallow: bool = False) -> Prediction:
        """Call the UNet.

        Args:
            sample: [N, C, H, W], float32, of unit variance; N rows, or the fewer.
            timestep: in training steps.
            shallow: whether to call the shallow UNet, with the deep features of the last call of the whole one, which
                had at least as many rows.
        """
        changing = {SAMPLE: sample, **self._rows_of(timestep)}
        if shallow:
            assert self._shallow is not None, "the shallow UNet was not asked for"
            return self._shallow.predict(changing)
        step = self._fewer if self._fewer is not None and len(sample) == self._fewer_rows else self._whole
        begin = time.perf_counter()
        outputs = step.run(changing)
        seconds = time.perf_counter() - begin
        if self._shallow is not None:
            self._shallow.keep(outputs)
        return Prediction("unet", {**changing, **step.held}, outputs[PREDICTION], seconds)

    def _rows_of(self, timestep: float) -> Feeds:
        """All that the UNet takes and that changes with the timestep only."""
        if timestep not in self._rows:
            fed = np.array([timestep], np.float32)
            rows: dict[str, NDArray[np.generic]] = {TIMESTEP: fed} if TIMESTEP in self._inputs else {}
            for part in self._timestep_parts:
                rows |= self._run(part, {TIMESTEP: fed, **self._conditions})
            self._rows[timestep] = rows
        return self._rows[timestep]

    def _run(self, part: ComponentSpec, feeds: Feeds) -> Feeds:
        missing = [tensor.name for tensor in part.inputs if tensor.name not in feeds]
        if missing:
            raise InputError(f"{part.name} takes the input {missing[0]}: {missing[0]} is missing")
        wanted = {tensor.name: feeds[tensor.name] for tensor in part.inputs}
        return {name: value for name, value in self._run_part(part, wanted).items() if name in self._inputs}


def _last_rows(feeds: Feeds, count: int) -> Feeds:
    return {name: value[-count:] for name, value in feeds.items()}


class _ShallowUnet:
    """The shallow UNet of DeepCache, between two calls of the whole one.

    Args:
        session: its engine.
        unet: interface of the whole one.
        held: what the whole one takes that stays the same.
        fewer_rows: see `PreparedUnet`.
    """

    def __init__(self, session: Session, unet: ComponentSpec, held: Feeds, fewer_rows: int | None) -> None:
        self._session = session
        self._inputs = {tensor.name for tensor in session.spec.inputs}
        self._cached = cached_tensors(unet, session.spec)
        self._conditions = self._taken(held)
        if fewer_rows is not None:  # tells the engine of both sizes before its first run
            session.hold(self._conditions)
            session.hold(_last_rows(self._conditions, fewer_rows))
        self._held: Feeds = {}
        self._step: Run | None = None

    def keep(self, outputs: Feeds) -> None:
        """Keep the deep features among what the whole UNet gave."""
        cached = {name: outputs[name] for name in self._cached}
        rows = len(outputs[PREDICTION])
        self._held = {**_last_rows(self._conditions, rows), **cached}
        self._step = None

    def predict(self, changing: Feeds) -> Prediction:
        """Call it with what the whole UNet would be called with."""
        assert self._held, "the first step has to be one of the whole UNet"
        feeds = self._taken(changing)
        rows = len(changing[SAMPLE])
        if rows < len(next(self._held[name] for name in self._cached)):
            self._held, self._step = _last_rows(self._held, rows), None
        begin = time.perf_counter()
        if self._step is None:
            self._step = self._session.hold(self._held)
        output = self._step(feeds)[PREDICTION]
        seconds = time.perf_counter() - begin
        return Prediction(SHALLOW, {**feeds, **self._held}, output, seconds)

    def _taken(self, feeds: Feeds) -> Feeds:
        return {name: value for name, value in feeds.items() if name in self._inputs}
