"""A UNet in shards: it gives what the whole one gives, and no more than two shards are ever loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from test_hoisted import SPEC

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.deepcache import divide_unet
from sdc.compiler.sharding import shard_component
from sdc.engines.errors import BundleError, InputError
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.sharded import ShardedSession
from sdc.engines.specs import ComponentSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import load_graph

COUNT = 4
BACKENDS = {"cpu": "openvino", "ort-cpu": "onnxruntime"}
ROUNDING = {"cpu": 0.0, "ort-cpu": 1e-5}
"""ONNX Runtime adds a residual to the sums of a convolution where it finds both in one graph."""


class Engines:
    """The engines of a UNet, whole and in shards, and a record of what is loaded.

    Attributes:
        events: "load NAME", "run NAME" and "close NAME" in the order in which they happened.
        loaded: names of what is loaded now; `most` counts the most at a time.
    """

    def __init__(self, folder: Path, target: str) -> None:
        typed = Component(SPEC, load_graph("unet"))
        run_passes((*canonical_passes(), *fusion_passes("unet"), *precision_passes("fp32")), typed.model)
        (unet, *_), _ = divide_unet(typed, hoist=True, deepcache=None)
        shards, _ = shard_component(unet, COUNT)
        self.spec, self.shards = unet.spec, tuple(each.spec for each in shards)
        self._sources: dict[str, EngineSource] = {}
        for component in (*shards, unet):
            run_passes(lowering_passes(BACKENDS[target]), component.model)
            name = component.spec.name
            built = build_engine(component, TARGETS[target], folder / name)
            files = tuple(folder / name / file for file in built.files)
            self._sources[name] = EngineSource(component.spec, BACKENDS[target], files, built.options)
        self.forget()

    def forget(self) -> None:
        self.events: list[str] = []
        self.loaded: list[str] = []
        self.most = 0

    def open(self, name: str) -> Session:
        return open_session(self._sources[name], threads=1)

    def load(self, name: str) -> Session:
        session = Recorded(self.open(name), self)
        self.note("load", name)
        self.loaded.append(name)
        self.most = max(self.most, len(self.loaded))
        return session

    def note(self, event: str, name: str) -> None:
        self.events.append(f"{event} {name.removeprefix('unet_shard_')}")

    def session(self, *, prefetch: bool = True) -> ShardedSession:
        return ShardedSession(self.spec, self.shards, self.load, prefetch=prefetch)

    def feeds(self, *, batch: int = 2, height: int = 8, width: int = 12, seed: int = 5) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        sizes = {"B": batch, "H": height, "W": width}
        return {
            tensor.name: generator.standard_normal(
                tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape), dtype=np.float32
            )
            for tensor in self.spec.inputs
        }

    def whole(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        with self.open("unet") as session:
            return session.run(feeds)["out_sample"]


class Recorded:
    """A session that says what happens to it."""

    def __init__(self, session: Session, engines: Engines) -> None:
        self.spec: ComponentSpec = session.spec
        self._session, self._engines = session, engines
        self.hold = session.hold
        self.memory_bytes = session.memory_bytes
        if hasattr(session, "prepare"):
            self.prepare = session.prepare

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._engines.note("run", self.spec.name)
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()
        self._engines.note("close", self.spec.name)
        self._engines.loaded.remove(self.spec.name)

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture(scope="module", params=BACKENDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engines]:
    return request.param, Engines(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def engines(built: tuple[str, Engines]) -> Engines:
    built[1].forget()
    return built[1]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert wanted.std() > 0
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("prefetch", [True, False])
def test_equals_the_whole_in_several_runs(built: tuple[str, Engines], engines: Engines, prefetch: bool) -> None:
    target = built[0]
    with engines.session(prefetch=prefetch) as session:
        for seed in (1, 2, 3):
            feeds = engines.feeds(seed=seed)
            found = session.run(feeds)
            assert list(found) == ["out_sample"]
            assert relative(found["out_sample"], engines.whole(feeds)) <= ROUNDING[target]
    assert engines.loaded == []


def test_equals_the_whole_when_the_size_changes(built: tuple[str, Engines], engines: Engines) -> None:
    """What was made ready for the size before is not used: it would be compiled for every size, and round otherwise."""
    with engines.session() as session:
        for size in ({"batch": 2}, {"batch": 1, "height": 16, "width": 8}, {"batch": 2}):
            feeds = engines.feeds(**size)
            assert relative(session.run(feeds)["out_sample"], engines.whole(feeds)) <= ROUNDING[built[0]]


def test_one_shard_is_loaded_at_a_time(engines: Engines) -> None:
    with engines.session(prefetch=False) as session:
        session.run(engines.feeds())
        assert session.memory_bytes == 0
    assert engines.events == [f"{event} {index}" for index in range(COUNT) for event in ("load", "run", "close")]
    assert engines.most == 1


def test_the_next_shard_is_loaded_ahead_and_no_other(engines: Engines) -> None:
    with engines.session() as session:
        for _ in range(2):
            session.run(engines.feeds())
    order = engines.events
    closes = [place for place, event in enumerate(order) if event.startswith("close")]
    loads = [place for place, event in enumerate(order) if event.startswith("load")]
    assert [order[place] for place in loads] == [f"load {index % COUNT}" for index in range(2 * COUNT + 1)]
    assert [order[place] for place in closes] == [f"close {index % COUNT}" for index in range(2 * COUNT + 1)]
    assert all(close < load for close, load in zip(closes, loads[2:], strict=False)), "closed before the next but one"
    assert engines.most <= 2
    assert engines.loaded == []


def test_held_feeds_serve_several_runs(engines: Engines) -> None:
    feeds = engines.feeds()
    held = {name: array for name, array in feeds.items() if name.startswith("prompt")}
    with engines.session() as session:
        step = session.hold(held)
        for seed in (7, 8):
            others = {name: array for name, array in engines.feeds(seed=seed).items() if name not in held}
            np.testing.assert_array_equal(step(others)["out_sample"], session.run(held | others)["out_sample"])


def test_feeds_outside_of_the_interface_are_refused_before_anything_is_loaded(engines: Engines) -> None:
    feeds = engines.feeds()
    with engines.session() as session:
        with pytest.raises(InputError, match="sample is missing"):
            session.run({name: array for name, array in feeds.items() if name != "sample"})
        with pytest.raises(InputError, match="H must be a multiple of 4, found 10"):
            session.run({**feeds, "sample": np.zeros((2, 4, 10, 12), np.float32)})
    assert engines.events == []


def test_feeds_are_left_alone(engines: Engines) -> None:
    feeds = engines.feeds()
    kept = {name: array.copy() for name, array in feeds.items()}
    with engines.session() as session:
        session.run(feeds)
    for name, array in kept.items():
        np.testing.assert_array_equal(feeds[name], array)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_shard_that_cannot_be_loaded_is_an_error_and_leaves_nothing(engines: Engines, prefetch: bool) -> None:
    def load(name: str) -> Session:
        if name.endswith("2"):
            raise BundleError("unet_shard_2 has changed")
        return engines.load(name)

    session = ShardedSession(engines.spec, engines.shards, load, prefetch=prefetch)
    with pytest.raises(BundleError, match="unet_shard_2 has changed"):
        session.run(engines.feeds())
    session.close()
    session.close()
    assert engines.loaded == []


def test_what_failed_ahead_is_tried_again_when_it_is_needed(engines: Engines) -> None:
    failures = ["unet_shard_0"]  # loaded ahead for the next run

    def load(name: str) -> Session:
        if name in failures and engines.events:
            failures.remove(name)
            raise BundleError("not now")
        return engines.load(name)

    with ShardedSession(engines.spec, engines.shards, load) as session:
        first = session.run(engines.feeds())
        again = session.run(engines.feeds())
    assert not failures
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)


def test_closing_waits_for_what_is_being_loaded(engines: Engines) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slowly(load: Callable[[str], Session]) -> Callable[[str], Session]:
        def loaded(name: str) -> Session:
            if name.endswith("0") and engines.events:
                started.set()
                go_on.wait(10)
            return load(name)

        return loaded

    session = ShardedSession(engines.spec, engines.shards, slowly(engines.load))
    session.run(engines.feeds())
    assert started.wait(10)
    go_on.set()
    session.close()
    assert engines.loaded == []
    assert engines.events[-1] == "close 0"
