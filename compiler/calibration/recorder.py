"""Stands in for a UNet's session and keeps what its tensors hold, in memory that does not grow with the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sdc.engines.errors import NumericalError
from sdc.engines.session import Run, Session
from sdc.passes.precision.log_histogram import LogHistogram
from sdc.passes.precision.observe_activations import MAXIMA, MEANS, MINIMA, Observed, samples_name
from sdc.passes.precision.tensor_statistics import ChannelRanges, TensorStatistics


class Recorder:
    """Runs an observed session, adds up what it tells by timestep and hands the rest on.

    Args:
        session: of the network with the outputs of `ObserveActivations`.
        tensors: what it observes.
        on_run: called after each run.
    """

    def __init__(self, session: Session, tensors: Sequence[Observed], on_run: Callable[[], None]) -> None:
        self.spec = session.spec
        self._session = session
        self._tensors = tensors
        self._on_run = on_run
        self._rows = 0
        self._offsets = np.cumsum([0, *(each.channels for each in tensors)])
        self._minima: dict[float, NDArray[np.float32]] = {}
        self._maxima: dict[float, NDArray[np.float32]] = {}
        self._sums = np.zeros(self._offsets[-1])
        self._histograms = {index: LogHistogram() for index, each in enumerate(tensors) if each.sampled}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        outputs = self._session.run(feeds)
        timestep, rows = float(feeds["timestep"].flat[0]), len(feeds["sample"])
        minima, maxima, means = (outputs.pop(name) for name in (MINIMA, MAXIMA, MEANS))
        samples = {index: outputs.pop(samples_name(index)) for index in self._histograms}
        self._check_finite(minima, maxima, timestep)
        self._minima[timestep] = np.minimum(self._minima.get(timestep, minima), minima)
        self._maxima[timestep] = np.maximum(self._maxima.get(timestep, maxima), maxima)
        self._sums += rows * means.astype(np.float64)
        self._rows += rows
        for index, values in samples.items():
            self._histograms[index].add(values)
        self._on_run()
        return outputs

    def _check_finite(self, minima: np.ndarray, maxima: np.ndarray, timestep: float) -> None:
        finite = np.isfinite(minima) & np.isfinite(maxima)
        if not finite.all():
            index = int(np.searchsorted(self._offsets, int(np.argmin(finite)), side="right")) - 1
            raise NumericalError(
                f"tensor {self._tensors[index].name!r} holds NaN or infinity at timestep {timestep:g}, in float32",
                hint="check the checkpoint",
            )

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """See `Session.hold`; it always hands everything over."""
        return lambda others: self.run({**feeds, **others})

    @property
    def timesteps(self) -> tuple[float, ...]:
        """In the order of a run."""
        return tuple(self._minima)

    def statistics(self) -> dict[str, TensorStatistics]:
        """What was seen of each tensor that is sampled, by its name."""
        minima, maxima = np.stack(list(self._minima.values())), np.stack(list(self._maxima.values()))
        means = (self._sums / self._rows).astype(np.float32)
        found = {}
        for index, histogram in self._histograms.items():
            part = self._channels(index)
            found[self._tensors[index].name] = TensorStatistics(
                minima=tuple(minima[:, part].min(axis=1).tolist()),
                maxima=tuple(maxima[:, part].max(axis=1).tolist()),
                channel_minima=tuple(minima[:, part].min(axis=0).tolist()),
                channel_maxima=tuple(maxima[:, part].max(axis=0).tolist()),
                channel_means=tuple(means[part].tolist()),
                histogram=histogram,
            )
        return found

    def channel_ranges(self) -> dict[str, ChannelRanges]:
        """What was seen of each channel of the tensors that are not sampled, by name."""
        low = np.min(list(self._minima.values()), axis=0)
        high = np.max(list(self._maxima.values()), axis=0)
        return {
            each.name: ChannelRanges(
                tuple(low[self._channels(index)].tolist()), tuple(high[self._channels(index)].tolist())
            )
            for index, each in enumerate(self._tensors)
            if not each.sampled
        }

    def _channels(self, index: int) -> slice:
        return slice(self._offsets[index], self._offsets[index + 1])

    @property
    def memory_bytes(self) -> int:
        """As the session that it stands for."""
        return self._session.memory_bytes

    def close(self) -> None:
        """Leaves the session to its owner."""

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
