"""The memory plan of a UNet in shards beside what its session does."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from minimal_pipeline import save_minimal_pipeline

from sdc.compiler.cli import main
from sdc.compiler.memory.engine_plan import Request, component_sizes
from sdc.compiler.memory.measure import random_feeds
from sdc.compiler.memory.picture_plan import plan_pictures
from sdc.engines.bundle import open_bundle
from sdc.engines.session import Run, Session
from sdc.engines.sessions.sharded import ShardedSession
from sdc.engines.wiring import shards_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for both CPU backends whose UNet is in three shards."""
    place = tmp_path_factory.mktemp("sharded")
    model = save_minimal_pipeline(place / "model")
    options = ("--precision", "fp32", "--target", "ort-cpu,cpu", "--shards", "3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDC_CACHE", str(place / "cache"))
        assert main(["export", "--model", str(model), "--out", str(place / "bundle"), *options]) == 0
    return place / "bundle"


class Watched:
    """A shard's real session, which notes what arrays of the UNet's shards are alive once it has run."""

    def __init__(self, session: Session, alive: dict[str, weakref.ref[np.ndarray]], found: dict[str, int]) -> None:
        self.spec, self.memory_bytes = session.spec, session.memory_bytes
        self._session, self._alive, self._found = session, alive, found

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._session.run(feeds)
        self._alive |= {name: weakref.ref(array) for name, array in results.items()}
        gc.collect()
        arrays = [array for array in (each() for each in self._alive.values()) if array is not None]
        self._found[self.spec.name] = sum(array.nbytes for array in arrays)
        return results

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        return self._session.hold(feeds)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_shards_are_planned_as_they_run(folder: Path, prefetch: bool) -> None:
    bundle, request = open_bundle(folder), Request(40, 40, 1, 5.0, prefetch=prefetch)
    unet, shards = bundle.manifest.components["unet"], shards_of(bundle.manifest.components)
    plan = plan_pictures(bundle, "ort-cpu", request)

    found: dict[str, int] = {}
    alive: dict[str, weakref.ref[np.ndarray]] = {}
    target = bundle.target("ort-cpu")
    with ShardedSession(
        unet, shards, lambda name: Watched(bundle.load_session(name, target), alive, found), prefetch=prefetch
    ) as session:
        feeds = random_feeds(unet, component_sizes(unet, bundle, request))
        for _ in range(2):
            alive.clear()  # what the run before gave is the caller's
            session.run(feeds)
    given = sum(array.nbytes for array in feeds.values())
    names = [shard.name for shard in shards]
    stages = {stage.component: stage for stage in plan.stages}
    assert {name: stages[name].input_bytes for name in names} == {name: given + found[name] for name in names}
    assert len({found[name] for name in names}) > 1, "skips cross all cuts alike"

    assert [name for name in stages if name.startswith("unet_shard")] == names
    assert not plan.loads_ahead
    assert "unet" not in plan.engines
    held = {name: engine.held.weight_bytes + engine.held.graph_bytes for name, engine in plan.engines.items()}
    for index, name in enumerate(names):
        following = names[(index + 1) % len(names)]
        beside = held[following] + plan.engines[following].held.page_bytes if prefetch else 0
        own = held[name] + plan.engines[name].activation_bytes + stages[name].input_bytes
        assert stages[name].released_bytes == own + beside
    assert ("unet_shard_0" in stages["vae_decoder"].loaded) == prefetch


def test_below_a_limit_one_shard_is_in_memory_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(folder), "--target", "cpu", "--json", "-"]
    plans = {}
    for name, more in {"usual": [], "in turn": ["--no-prefetch"], "limited": ["--memory-limit", "1GiB"]}.items():
        assert main([*arguments, *more]) == 0
        (plans[name],) = json.loads(capsys.readouterr().out)["targets"]
    assert plans["limited"]["stages"] == plans["in turn"]["stages"]
    shards = {
        name: [
            sum(loaded.startswith("unet_shard") for loaded in stage["loaded"])
            for stage in plan["stages"]
            if stage["component"].startswith("unet_shard")
        ]
        for name, plan in plans.items()
    }
    assert shards == {"usual": [2, 2, 2], "in turn": [1, 1, 1], "limited": [1, 1, 1]}
    assert main([*arguments, "--memory-limit", "100MiB"]) == 2
    assert "are too little for 1 x" in capsys.readouterr().err
