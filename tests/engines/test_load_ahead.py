"""The UNet is loaded while the text encoder runs, and whatever goes wrong meanwhile is told and cleaned up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hoisted import CHANNELS, embed, engines, make_networks  # noqa: F401  # fixtures
from torch_pipeline import ARCHITECTURES, TorchSession, build_diffusers, build_ours

from sdc.engines.errors import BundleError
from sdc.engines.measures import Measures
from sdc.engines.networks import Networks
from sdc.engines.pipeline import Pipeline
from sdc.engines.session import Session
from sdc.engines.sessions.feeds import Shapes
from sdc.engines.sessions.openvino import OpenVinoSession

INTERRUPTED = Path(__file__).with_name("interrupted_wait.py")
PATIENCE_SECONDS = 60.0
"""Until a test that waits for another thread gives up."""


class Ready:
    """A session that can be prepared, and notes what for; the rest is another's."""

    def __init__(self, session: TorchSession, loaded: Loader) -> None:
        self.spec, self.run, self.hold = session.spec, session.run, session.hold
        self.memory_bytes = 0
        self.session, self._loaded = session, loaded

    def prepare(self, *shapes: Shapes, before_weights: Callable[[], object]) -> None:
        self._loaded.note("prepare")
        self._loaded.prepared.append(shapes)
        self._loaded.slow()
        self._loaded.note("before weights")
        before_weights()
        self._loaded.weights_beside = self._loaded.open_engines()
        self._loaded.note("weights")

    def close(self) -> None:
        self.session.close()
        self._loaded.note("close unet")

    def __enter__(self) -> Ready:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Loader:
    """Loads the engines of a pipeline, and records what happens.

    Attributes:
        events: in the order in which they happened, each with the name of its thread.
        prepared: what the UNet was made ready for, by loading.
        slow: called while the UNet is made ready.
        when_loaded: called when an engine is loaded, by name.
        failure: what loading an engine fails with, by name.
        weights_beside: engines that were in memory when the UNet took its weights.
    """

    def __init__(self, theirs: Any, tokenizer: Path) -> None:
        self.ours, _ = build_ours(theirs, tokenizer)
        self.forget()

    def forget(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.prepared: list[tuple[Shapes, ...]] = []
        self.slow: Callable[[], None] = lambda: None
        self.when_loaded: defaultdict[str, Callable[[], None]] = defaultdict(lambda: lambda: None)
        self.failure: dict[str, Exception] = {}
        self.sessions: list[TorchSession] = []
        self.weights_beside: list[str] = []

    def open_engines(self) -> list[str]:
        """Those that are loaded, but the UNet's."""
        return [each.spec.name for each in self.sessions if not each.closed and each.spec.name != "unet"]

    def note(self, event: str) -> None:
        self.events.append((event, threading.current_thread().name))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    def load(self, component: str) -> Session:
        self.note(f"load {component}")
        if component in self.failure:
            raise self.failure[component]
        self.ours.close()
        session = self.ours.networks.session(component)
        assert isinstance(session, TorchSession)
        self.sessions.append(session)
        self.note(f"open {component}")
        self.ours.networks._sessions.clear()
        run = session.run

        def noted(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.note(f"run {component}")
            return run(feeds)

        session.run = noted  # type: ignore[method-assign]
        self.when_loaded[component]()
        return Ready(session, self) if component == "unet" else session

    def pipeline(self, *, load_ahead: bool = True, keep_loaded: bool = True) -> Pipeline:
        ours = self.ours
        return Pipeline(
            tokenizer=ours.tokenizer,
            schedule=ours.schedule,
            settings=ours.settings,
            specs=ours.networks.specs,
            load_session=self.load,
            keep_loaded=keep_loaded,
            load_ahead=load_ahead,
        )


@pytest.fixture(scope="module")
def _loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    folder = tmp_path_factory.mktemp("pipeline")
    return Loader(build_diffusers(ARCHITECTURES[0], folder), folder / "tokenizer")


@pytest.fixture
def loader(_loader: Loader) -> Loader:
    _loader.forget()
    return _loader


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sdc-load")]


def wait_for_threads() -> None:
    for thread in loading_threads():
        thread.join(PATIENCE_SECONDS)
    assert not loading_threads()


def wait_until(loader: Loader, event: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while event not in loader.names():
        assert time.monotonic() < deadline, f"{event!r} has to come"
        time.sleep(0.001)


def plan(pipe: Pipeline, **options: Any) -> Any:
    return pipe.plan("a red bag", steps=2, seed=1, **{"guidance_scale": 3.0, **options})


def test_the_text_encoder_runs_while_the_unet_is_made_ready(loader: Loader) -> None:
    usual = loader.pipeline(load_ahead=False)
    wanted = usual.denoise(plan(usual))
    order = ["open text_encoder", "run text_encoder", "open unet", "run unet", "run unet"]
    assert [name for name in loader.names() if not name.startswith("load")] == order, "without, they take turns"
    loader.forget()

    loader.slow = lambda: wait_until(loader, "run text_encoder")
    pipe = loader.pipeline()
    assert pipe.denoise(plan(pipe)).tobytes() == wanted.tobytes()
    assert loader.names().index("prepare") < loader.names().index("run text_encoder")
    threads = dict(loader.events)
    assert threads["prepare"] == threads["load unet"] != threads["run unet"] == threading.current_thread().name
    wait_for_threads()
    loader.events.clear()
    pipe.denoise(plan(pipe))
    assert loader.names() == ["run text_encoder", "run unet", "run unet"], "it is loaded once"


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [2]),
        ({"guidance_scale": 1.0}, [1]),
        ({"guidance_steps": (0, 1)}, [1, 2]),
        ({"batch": 3, "measures": Measures(pictures_at_once=2)}, [2, 4]),
        ({"batch": 2, "measures": Measures(pictures_at_once=1)}, [2]),
    ],
)
def test_the_unet_is_made_ready_for_the_shapes_that_it_will_get(
    loader: Loader, options: dict[str, Any], rows: list[int]
) -> None:
    pipe = loader.pipeline()
    seen: set[int] = set()
    pipe.denoise(plan(pipe, height=32, width=48, **options), on_step=lambda step: seen.add(len(step.feeds["sample"])))
    pipe.close()
    states = pipe.networks.specs["unet"].inputs[2].shape[1:]
    size = 32 // pipe.settings.vae_reduction, 48 // pipe.settings.vae_reduction
    expected = [
        {"sample": (each, 4, *size), "timestep": (1,), "encoder_hidden_states": (each, *states)} for each in rows
    ]
    assert [list(shapes) for shapes in loader.prepared] == [expected]
    assert sorted(seen) == rows


def test_engines_that_are_not_kept_are_released_in_time(loader: Loader) -> None:
    pipe = loader.pipeline(keep_loaded=False)
    open_at_steps: list[list[str]] = []

    def look(_: Any) -> None:
        open_at_steps.append([session.spec.name for session in loader.sessions if not session.closed])

    for _ in range(2):
        pipe.draw(plan(pipe), on_step=look)
    assert open_at_steps == [["unet"]] * 4
    assert all(session.closed for session in loader.sessions)
    assert loader.names().count("load unet") == 2
    wait_for_threads()


@pytest.mark.parametrize("where", ["load", "prepare"])
def test_what_fails_in_the_thread_is_raised_where_the_picture_is_asked_for(loader: Loader, where: str) -> None:
    pipe = loader.pipeline()
    failure = BundleError("the file is damaged")

    def fail() -> None:
        raise failure

    if where == "load":
        loader.failure["unet"] = failure
    else:
        loader.slow = fail
    for _ in range(2):
        with pytest.raises(BundleError, match="damaged"):
            pipe.denoise(plan(pipe))
    assert where == "load" or all(each.closed for each in loader.sessions if each.spec.name == "unet")
    loader.failure.clear()
    loader.slow = lambda: None
    assert np.isfinite(pipe.denoise(plan(pipe))).all(), "it is tried again"
    pipe.close()
    wait_for_threads()


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_the_unet_takes_no_weights_beside_a_text_encoder_that_is_released(loader: Loader, keep_loaded: bool) -> None:
    def until_the_unet_lacks_its_weights() -> None:
        wait_until(loader, "weights" if keep_loaded else "before weights")
        time.sleep(0.0 if keep_loaded else 0.2)  # that it does not wait would be seen

    loader.slow = lambda: wait_until(loader, "open text_encoder")
    loader.when_loaded["text_encoder"] = until_the_unet_lacks_its_weights
    pipe = loader.pipeline(keep_loaded=keep_loaded)
    pipe.draw(plan(pipe))
    assert loader.weights_beside == (["text_encoder"] if keep_loaded else [])
    pipe.close()
    wait_for_threads()


@pytest.mark.parametrize(
    "error", [BundleError("the file is damaged"), KeyboardInterrupt()], ids=["fails", "interrupted"]
)
def test_the_unet_that_waits_is_given_up_if_the_text_is_never_encoded(loader: Loader, error: BaseException) -> None:
    """Without a call of `close`: its thread would keep the interpreter from ending."""

    def fail() -> None:
        wait_until(loader, "before weights")
        raise error

    loader.when_loaded["text_encoder"] = fail
    pipe = loader.pipeline(keep_loaded=False)
    with pytest.raises(type(error)):
        pipe.denoise(plan(pipe))
    wait_for_threads()
    assert "weights" not in loader.names()
    assert loader.names().count("close unet") == 1
    loader.when_loaded.clear()
    assert np.isfinite(pipe.denoise(plan(pipe))).all(), "it is tried again"
    assert loader.names().count("weights") == 1
    pipe.close()


def test_the_unet_that_waits_goes_on_even_if_releasing_fails(loader: Loader) -> None:
    pipe = loader.pipeline(keep_loaded=False)

    def fail() -> None:
        raise OSError("no close")

    def break_close() -> None:
        wait_until(loader, "before weights")
        loader.sessions[-1].close = fail  # type: ignore[method-assign]

    loader.when_loaded["text_encoder"] = break_close
    with pytest.raises(OSError, match="no close"):
        pipe.denoise(plan(pipe))
    wait_for_threads()
    pipe.close()


def test_the_unet_is_released_if_it_is_never_needed(loader: Loader) -> None:
    pipe = loader.pipeline()
    loader.failure["text_encoder"] = BundleError("the file is damaged")
    with pytest.raises(BundleError, match="damaged"):
        pipe.denoise(plan(pipe))
    with pytest.raises(BundleError, match="damaged"):
        pipe.denoise(plan(pipe, height=32, width=48))
    sizes = [shapes[0]["sample"] for shapes in loader.prepared]
    assert sizes[0] != sizes[1]
    assert loader.names().index("close unet") < len(loader.names()) - 1 - loader.names()[::-1].index("load unet")
    pipe.close()
    assert all(session.closed for session in loader.sessions)
    assert loader.names().count("close unet") == 2
    wait_for_threads()


def test_an_interrupt_while_waiting_leaves_nothing_behind() -> None:
    """In a process of its own: a signal that comes a moment too late or too early ends the one that it comes to."""
    ran = subprocess.run(
        [sys.executable, INTERRUPTED], capture_output=True, text=True, check=False, timeout=2 * PATIENCE_SECONDS
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["interrupted", "closed", "1 thread"]


@pytest.mark.parametrize("samples", [[(2, CHANNELS, 8, 4)], [(2, CHANNELS, 8, 4), (4, CHANNELS, 8, 4)]])
def test_an_engine_that_was_made_ready_gives_the_same(make_networks: Any, samples: list[tuple[int, ...]]) -> None:  # noqa: F811
    def predict(networks: Networks) -> list[np.ndarray]:
        generator = np.random.default_rng(1)
        rows = [sample[0] for sample in samples]
        conditions = {"encoder_hidden_states": embed(["a" * (1 + each) for each in range(max(rows))])}
        fewer = None if len(rows) == 1 else min(rows)
        predictor = networks.predictor(conditions, steps=len(rows), timesteps=[31.0], fewer_rows=fewer)
        inputs = [generator.standard_normal(sample, dtype=np.float32) for sample in samples]
        return [predictor(each, 31.0) for each in inputs]

    (usual, _), (ahead, loaded) = make_networks("cpu", True), make_networks("cpu", True)
    wanted = predict(usual)
    networks = Networks(ahead.specs, lambda name: ahead.session(name).session)  # type: ignore[attr-defined]
    networks.load_unet_ahead(samples)
    session = networks.session("unet")
    assert isinstance(session, OpenVinoSession)
    engine = session._engine
    assert engine is not None
    assert (engine.shapes is None) == (len(samples) > 1)
    for found, expected in zip(predict(networks), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert session._engine is engine, "it was not compiled again"
    assert set(loaded) == {"unet", "unet_prompt", "unet_timestep"}
    networks.release()
    usual.release()
