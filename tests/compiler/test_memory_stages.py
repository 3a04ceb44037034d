"""What is held at the same time while a picture is drawn: beside every order of events, and beside the runtime."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, strategies
from whole_bundle import carry_memory_report, write_whole_bundle

from sdc.compiler.cli import main
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.memory.engine_plan import UNETS, EnginePlan, Request
from sdc.compiler.memory.graph_json import json_from_graph
from sdc.compiler.memory.openvino_engines import HeldEngine
from sdc.compiler.memory.picture_plan import plan_pictures
from sdc.compiler.memory.stages import STAGES, decoded_bytes, plan_stages
from sdc.engines import load
from sdc.engines.bundle import open_bundle
from sdc.engines.pipeline import Pipeline
from sdc.engines.session import Preparable, Run, Session
from sdc.engines.sessions.feeds import Shapes
from sdc.engines.specs import HOISTED, SHALLOW, shard_name
from sdc.engines.targets import ONNXRUNTIME, OPENVINO, TENSORRT_RTX
from sdc.passes.memory.arena import Arena
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.memory.plan import Arrangement, MemoryPlan

PATIENCE_SECONDS = 60.0
BYTES = strategies.integers(0, 1000)
REQUEST = Request(8, 8, 1, 5.0)


@strategies.composite
def pipelines(draw: strategies.DrawFn) -> dict[str, EnginePlan]:
    """Engines of any sizes: the three that a picture needs, and any of the others."""
    others = draw(strategies.sets(strategies.sampled_from([*HOISTED, SHALLOW])))
    return {name: draw(engines(name)) for name in STAGES if name not in (*HOISTED, SHALLOW) or name in others}


@strategies.composite
def engines(draw: strategies.DrawFn, name: str) -> EnginePlan:
    return EnginePlan(
        component=name,
        sizes={"B": 1},
        weight_bytes=0,
        held=HeldEngine(weights := draw(BYTES), draw(BYTES), draw(BYTES), draw(strategies.integers(0, weights))),
        memory=MemoryPlan(0, *[Arrangement((), (), Arena((), draw(BYTES)), 0)] * 2, input_bytes=draw(BYTES)),
        workspace_bytes=draw(BYTES),
        shares_arena=draw(strategies.booleans()),
    )


@strategies.composite
def sharded_pipelines(draw: strategies.DrawFn) -> tuple[dict[str, EnginePlan], dict[str, int]]:
    """Likewise with a UNet in shards, and bytes of the arrays beside each."""
    others = draw(strategies.sets(strategies.sampled_from(HOISTED)))
    arrays = {shard_name(index): draw(BYTES) for index in range(draw(strategies.integers(2, 4)))}
    names = ("text_encoder", *others, *arrays, "vae_decoder")
    return {name: draw(engines(name)) for name in names}, arrays


def most_held_in_shards(plans: Mapping[str, EnginePlan], arrays: Mapping[str, int], *, prefetch: bool) -> int:
    """The most bytes at one time: two runs of `ShardedSession`, at every point at which its thread can be."""
    at_once: list[int] = []
    workspace = 0

    def moment(name: str, *loaded: int, beside: int = 0, stay: tuple[str, ...] = ()) -> None:
        """An engine is compiled with pages of its file, then runs; a thread has got so far with another meanwhile."""
        nonlocal workspace
        plan = plans[name]
        own, inputs = plan.held.weight_bytes + plan.held.graph_bytes, arrays.get(name, plan.memory.input_bytes)
        at_once.append(own + plan.held.page_bytes + arrays.get(name, 0))
        workspace = max(workspace, plan.workspace_bytes)
        sharing = [each for each in stay if plan.shares_arena and plans[each].shares_arena]
        arena = max(plans[each].memory.written.arena.bytes for each in (name, *sharing))
        running = own + arena + workspace + inputs + beside
        at_once.extend(running + each for each in (0, *loaded))

    moment("text_encoder")
    hoisted = [name for name in HOISTED if name in plans]
    for index, name in enumerate(hoisted):
        before = sum(plans[each].held.weight_bytes + plans[each].held.graph_bytes for each in hoisted[:index])
        at_once.append(before + sum(vars(plans[name].held).values()) - plans[name].held.packed_bytes)
        moment(name, before, stay=tuple(hoisted[:index]))
    names = list(arrays)
    for _ in range(2):
        for index, name in enumerate(names):
            following = plans[names[(index + 1) % len(names)]].held
            compiled = following.graph_bytes + following.weight_bytes
            ahead = (following.graph_bytes, compiled, compiled + following.page_bytes) if prefetch else ()
            moment(name, *ahead)
    decoder = plans["vae_decoder"]
    moment("vae_decoder", beside=decoded_bytes(decoder, REQUEST))
    return max(at_once)


def most_held(engines: Mapping[str, EnginePlan], backend: str, *, prefetch: bool) -> int:
    """The most bytes at one time, over every point at which a thread that loads the UNet can be.

    Events of `Pipeline` in order; an engine is read, compiled, with pages of its file, and run; what is released is
    gone. OpenVINO compiles at the first run, the UNet not before the text encoder is gone. Workspace is shared, and
    stays; an arena that engines share does until they are released.
    """
    lazy, ahead = backend == OPENVINO, backend == OPENVINO and prefetch
    held: dict[str, int] = {}
    at_once: list[int] = []
    workspace = arena = 0

    def moments(*own: int, beside: tuple[int, ...] = (0,)) -> None:
        at_once.extend(sum(held.values()) + each + other for each in own for other in beside)

    def use(name: str, inputs: int, pictures: int, progress: tuple[int, ...] = (0,)) -> None:
        nonlocal workspace, arena
        engine = engines[name]
        held[name] = engine.held.weight_bytes + engine.held.graph_bytes
        moments(engine.held.page_bytes, beside=progress[:-1] or (0,))  # pages of one file at a time
        workspace = max(workspace, engine.workspace_bytes)
        own = engine.memory.written.arena.bytes
        arena = max(arena, own) if engine.shares_arena else arena
        moments((arena if engine.shares_arena else own) + workspace + inputs + pictures, beside=progress)

    unet = engines["unet"].held
    compiled = unet.weight_bytes + unet.graph_bytes
    packed = unet.graph_bytes + unet.packed_bytes
    waiting = (0, unet.graph_bytes, packed, packed + unet.page_bytes) if ahead else (0,)
    progress = (0, unet.graph_bytes, packed, compiled, compiled + unet.page_bytes) if ahead else (0,)
    use("text_encoder", engines["text_encoder"].memory.input_bytes, 0, waiting)
    del held["text_encoder"]
    arena = 0
    for name in (each for each in UNETS if each in engines and not (ahead and each == "unet")):
        held[name] = engines[name].held.graph_bytes + (0 if lazy else engines[name].held.weight_bytes)
    for name in (each for each in HOISTED if each in engines):
        use(name, engines[name].memory.input_bytes, 0, progress)
    for name in HOISTED:
        held.pop(name, None)
    arena = 0
    for name in (each for each in UNETS if each in engines):  # both are compiled before the last of them is done
        held[name] = engines[name].held.weight_bytes + engines[name].held.graph_bytes
    for name in (each for each in UNETS if each in engines):
        use(name, engines[name].memory.input_bytes, 0)
    held.clear()
    arena = 0
    decoder = engines["vae_decoder"]
    use("vae_decoder", decoder.memory.input_bytes, decoded_bytes(decoder, REQUEST))
    return max(at_once)


@given(pipelines(), strategies.sampled_from([OPENVINO, ONNXRUNTIME, TENSORRT_RTX]), strategies.booleans())
def test_the_peak_is_what_is_held_at_the_same_time(
    engines: dict[str, EnginePlan], backend: str, prefetch: bool
) -> None:
    request = Request(8, 8, 1, 5.0, deepcache=SHALLOW in engines, prefetch=prefetch)
    stages = plan_stages(engines, backend, request)
    assert max(stage.released_bytes for stage in stages) == most_held(engines, backend, prefetch=prefetch)


@given(sharded_pipelines(), strategies.sampled_from([OPENVINO, ONNXRUNTIME]), strategies.booleans())
def test_the_peak_in_shards_is_what_is_held_at_the_same_time(
    pipeline: tuple[dict[str, EnginePlan], dict[str, int]], backend: str, prefetch: bool
) -> None:
    plans, arrays = pipeline
    stages = plan_stages(plans, backend, Request(8, 8, 1, 5.0, prefetch=prefetch), shards=arrays)
    assert max(stage.released_bytes for stage in stages) == most_held_in_shards(plans, arrays, prefetch=prefetch)


@given(pipelines())
def test_loading_ahead_costs_only_while_it_loads(engines: dict[str, EnginePlan]) -> None:
    ahead = {each.component: each for each in plan_stages(engines, OPENVINO, REQUEST)}
    in_turn = {each.component: each for each in plan_stages(engines, OPENVINO, Request(8, 8, 1, 5.0, prefetch=False))}
    unet = engines["unet"].held
    for name, stage in ahead.items():
        more = stage.released_bytes - in_turn[name].released_bytes
        assert 0 <= more <= unet.weight_bytes + unet.graph_bytes + unet.page_bytes
        if name in (*UNETS, "vae_decoder"):
            assert more == 0
        elif name == "text_encoder":
            assert more >= unet.packed_bytes + unet.graph_bytes


class Ledger:
    """What sessions of the runtime hold by a plan's figures, and the most at one time.

    Where the UNet is loaded ahead, it has all that it can have when the text encoder runs: of all orders in which the
    two threads can do their work, the one that takes most.
    """

    def __init__(self, engines: Mapping[str, EnginePlan], request: Request) -> None:
        self.engines, self.request = engines, request
        self.peak_bytes = 0
        self.loading_threads: set[str] = set()
        self.packed, self.text_has_run = threading.Event(), threading.Event()
        self._held: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def hold(self, name: str, what: str, count: int) -> None:
        with self._lock:
            self._held[name, what] = count
            self.peak_bytes = max(self.peak_bytes, sum(self._held.values()))

    def drop(self, name: str, *what: str) -> None:
        with self._lock:
            for each in what:
                self._held.pop((name, each), None)


class Accounted:
    """An engine's real session, which notes in a ledger what it holds."""

    def __init__(self, session: Session, ledger: Ledger) -> None:
        self.spec, self.memory_bytes = session.spec, 0
        self._session, self._ledger = session, ledger
        self._plan = ledger.engines[session.spec.name]
        self._is_compiled = False
        ledger.hold(self.spec.name, "graph", self._plan.held.graph_bytes)

    def prepare(self, *shapes: Shapes, before_weights: Callable[[], object]) -> None:
        assert isinstance(self._session, Preparable)
        ledger, held = self._ledger, self._plan.held
        ledger.loading_threads.add(threading.current_thread().name)

        def wait() -> None:
            ledger.hold(self.spec.name, "weights", held.packed_bytes)
            ledger.hold(self.spec.name, "pages", held.page_bytes)
            ledger.packed.set()
            before_weights()
            assert ledger.text_has_run.is_set()

        self._session.prepare(*shapes, before_weights=wait)
        self._compile()()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        run, ledger, name = self._session.hold(feeds), self._ledger, self.spec.name

        def accounted(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if not self._is_compiled:
                self._compile()()
            if name == "text_encoder" and ledger.request.prefetch:
                assert ledger.packed.wait(PATIENCE_SECONDS)
            pictures = decoded_bytes(self._plan, ledger.request) if name == "vae_decoder" else 0
            ledger.hold(name, "run", self._plan.activation_bytes + self._plan.memory.input_bytes + pictures)
            results = run(others)
            ledger.drop(name, "run")
            if name == "text_encoder":
                ledger.text_has_run.set()
            return results

        return accounted

    def close(self) -> None:
        self._session.close()
        self._ledger.drop(self.spec.name, "graph", "weights")

    def __enter__(self) -> Accounted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compile(self) -> Callable[[], None]:
        """Hold the weights and pages of the file; gives what lets go of these."""
        self._is_compiled = True
        self._ledger.hold(self.spec.name, "weights", self._plan.held.weight_bytes)
        self._ledger.hold(self.spec.name, "pages", self._plan.held.page_bytes)
        return lambda: self._ledger.drop(self.spec.name, "pages")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks, of whose memory their graphs take most: two that are loaded more than any that runs."""
    folder = write_whole_bundle(tmp_path_factory.mktemp("stages") / "small", targets=("ort-cpu", "cpu"))
    report = {}
    for component in open_bundle(folder).manifest.components:
        graph = buffers_from_graph(ir.load(folder / component / "model.onnx"))
        report[component] = {"cpu": json_from_graph(graph)}
    carry_memory_report(folder, report)
    return folder


def peak_of_runtime(bundle: Path, request: Request) -> int:
    """The most that the ledger says is held while pictures are drawn."""
    opened = open_bundle(bundle)
    plan = plan_pictures(opened, "cpu", request)
    ledger = Ledger(plan.engines, request)
    with load(bundle, "cpu", keep_loaded=False, prefetch=request.prefetch) as usual:
        pipe = Pipeline(
            tokenizer=usual.tokenizer,
            schedule=usual.schedule,
            settings=usual.settings,
            specs=usual.networks.specs,
            load_session=lambda name: Accounted(opened.load_session(name, opened.choose_target("cpu")), ledger),
            keep_loaded=False,
            load_ahead=plan.loads_ahead,
        )
        with pipe:
            pipe("a", steps=1, seed=1, height=request.height_px, width=request.width_px, guidance_scale=5.0)
    assert ledger.loading_threads == ({"sdc-load-unet_0"} if request.prefetch else set())
    return ledger.peak_bytes


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_runtime_holds_what_is_planned(bundle: Path, prefetch: bool) -> None:
    request = Request(32, 32, 1, 5.0, prefetch=prefetch)
    plan = plan_pictures(open_bundle(bundle), "cpu", request)
    assert peak_of_runtime(bundle, request) == plan.released_bytes
    largest = max(plan.stages, key=lambda stage: stage.released_bytes)
    assert (largest.component == "text_encoder") == prefetch, "only with the UNet beside it"


def test_the_plan_is_of_what_run_does(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for name, arguments in {"usual": [], "in turn": ["--no-prefetch"], "limited": ["--memory-limit", "1GiB"]}.items():
        assert main(["plan", str(bundle), "--target", "cpu", *arguments, "--json", "-"]) == 0
        (plans[name],) = json.loads(capsys.readouterr().out)["targets"]
        assert main(["plan", str(bundle), "--target", "cpu", *arguments]) == 0
        said = capsys.readouterr().out
        assert ("loads the UNet while the text encoder runs" in said) == plans[name]["loads_ahead"] == (name == "usual")
        assert ("`sdc run --no-prefetch`" in said) == (name != "usual")
        taken = plans[name]["released_bytes"] + plans[name]["process_bytes"]
        assert f"the process: {megabytes(taken)} in all" in said
    assert plans["usual"]["stages"][0]["loaded"] == ["unet", "text_encoder"]
    assert plans["in turn"]["stages"][0]["loaded"] == ["text_encoder"]
    assert plans["usual"]["released_bytes"] > plans["in turn"]["released_bytes"] == plans["limited"]["released_bytes"]
    assert main(["plan", str(bundle), "--target", "ort-cpu", "--json", "-"]) == 0
    assert not json.loads(capsys.readouterr().out)["targets"][0]["loads_ahead"], "ONNX Runtime loads fast enough"
