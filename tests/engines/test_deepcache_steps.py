"""DeepCache in the runtime: its schedules, its two engines, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hoisted import CHANNELS, SIZES, SPEC, Counting, embed

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.deepcache import divide_unet
from sdc.engines.deepcache import full_steps
from sdc.engines.errors import BundleError, InputError, NumericalError
from sdc.engines.networks import DenoisingStep, Networks
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.engines.wiring import check_wiring
from sdc.passes.base import run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import load_graph

ROUNDING = 1e-5
"""Backends may fuse the layers of the shallow graph in another way than those of the whole."""


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(20, 3, [0, 3, 6, 9, 12, 15, 18]), (5, 2, [0, 2, 4]), (4, 4, [0]), (4, 9, [0]), (3, 1, [0, 1, 2])],
)
def test_whole_unet_runs_at_every_nth_step(steps: int, interval: int, expected: list[int]) -> None:
    assert sorted(full_steps(steps, interval)) == expected


@pytest.mark.parametrize(("steps", "interval", "center"), [(50, 5, 15), (50, 3, 0), (50, 5, 49), (100, 10, 40)])
def test_whole_unet_runs_more_often_around_a_center(steps: int, interval: int, center: int) -> None:
    full = sorted(full_steps(steps, interval, center))
    assert full[0] == 0
    assert full[-1] < steps
    assert -(-steps // interval) - 1 <= len(full) <= -(-steps // interval) + 1
    gaps = np.diff([*full, steps])
    near = int(np.argmin(np.abs(np.array(full) + gaps / 2 - center)))
    assert gaps[near] == min(gaps) < max(gaps)


def test_a_center_by_hand() -> None:
    """i = 4 + sign(l) |l|^1.2 for l = -4^(1/1.2) + k (4^(1/1.2) + 8^(1/1.2)) / 4: l = -3.17, -0.96, 1.25, 3.45."""
    assert sorted(full_steps(12, 3, 4)) == [0, 3, 5, 8]


@pytest.mark.parametrize(
    ("interval", "center", "message"),
    [
        (0, None, "deepcache 0 was asked for; choose 2 or more"),
        (-3, None, "deepcache -3 was asked for"),
        (1, 4, "a centre of DeepCache was given without DeepCache; add an interval"),
        (3, 20, "deepcache center 20 is outside 0 to 19, the steps"),
        (3, -1, "deepcache center -1 is outside 0 to 19"),
    ],
)
def test_schedules_that_make_no_sense(interval: int, center: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        full_steps(20, interval, center)


def test_whole_steps_one_by_one() -> None:
    assert full_steps(20, (0, 1, 5, 19)) == {0, 1, 5, 19}


@pytest.mark.parametrize(
    ("schedule", "center", "message"),
    [
        ((1, 3), None, "deepcache at the steps 1, 3 was asked for; begin with step 0"),
        ((), None, "begin with step 0"),
        ((0, 4, 4), None, "deepcache at the steps 0, 4, 4 was asked for; begin with step 0, each later than the last"),
        ((0, 20), None, "deepcache at the steps 0, 20 was asked for, and the last of 20 steps is 19"),
        ((0, 3), 4, "a centre of DeepCache was given with its full steps; leave one of them out"),
    ],
)
def test_whole_steps_that_make_no_sense(schedule: tuple[int, ...], center: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        full_steps(20, schedule, center)


class Engines:
    """A UNet's engines with seeded weights, for one target."""

    def __init__(self, folder: Path, target: str, *, hoist: bool, depth: int) -> None:
        component = Component(SPEC, load_graph("unet"))
        run_passes((*canonical_passes(), *fusion_passes("unet")), component.model)
        parts, self.reports = divide_unet(component, hoist=hoist, deepcache=depth)
        self.sources: dict[str, EngineSource] = {}
        for part in parts:
            run_passes(lowering_passes(TARGETS[target].backend), part.model)
            built = build_engine(part, TARGETS[target], folder / part.spec.name)
            files = tuple(folder / part.spec.name / name for name in built.files)
            self.sources[part.spec.name] = EngineSource(part.spec, TARGETS[target].backend, files, built.options)
        self.loaded: dict[str, Counting] = {}
        self.networks = Networks({name: source.spec for name, source in self.sources.items()}, self._load)

    def _load(self, name: str) -> Counting:
        self.loaded[name] = Counting(open_session(self.sources[name], threads=1))
        return self.loaded[name]


@pytest.fixture(scope="module", params=["ort-cpu", "cpu"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engines(target: str, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"), target, hoist=True, depth=0)


def make_sample(seed: int, *, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, CHANNELS, height, width), dtype=np.float32)


CONDITIONS = {"encoder_hidden_states": embed(["a red bag", "white"])}


@pytest.mark.parametrize(("hoist", "depth"), [(True, 0), (False, 0), (True, 4), (False, 8)])
def test_shallow_unet_gives_what_the_whole_one_gives_at_the_same_step(
    target: str, hoist: bool, depth: int, tmp_path: Path
) -> None:
    made = Engines(tmp_path, target, hoist=hoist, depth=depth)
    for size in ({}, {"height": 16, "width": 4}):
        predict = made.networks.predictor(CONDITIONS, steps=3, full_steps={0, 2})
        sample = make_sample(1, **size)
        whole, shallow = predict(sample, 601.0), predict(sample, 601.0)
        assert whole.std() > 0.1
        assert np.abs(shallow - whole).max() <= ROUNDING * np.abs(whole).max()
        np.testing.assert_array_equal(predict(sample, 601.0), whole)
    assert [len(made.loaded[name].rows) for name in ("unet", "unet_shallow")] == [4, 2]
    made.networks.release()


def test_interface_of_lower_levels_has_sizes_of_its_own(tmp_path: Path) -> None:
    specs = Engines(tmp_path, "ort-cpu", hoist=True, depth=4).networks.specs
    deep = TensorSpec("deep.0", "float32", ("B", 96, "H/2", "W/2"))
    assert specs["unet"].outputs == (*SPEC.outputs, deep)
    assert specs["unet_shallow"].inputs[-1] == deep
    for name in ("unet", "unet_shallow"):
        assert specs[name].dimensions["H/2"] == DimensionRange(2, 4, 8, 2)
        assert {symbol: specs[name].dimensions[symbol] for symbol in SIZES} == SIZES
        assert ComponentSpec.from_json(specs[name].to_json()) == specs[name]


def test_deep_features_are_those_of_the_last_whole_step(engines: Engines) -> None:
    networks = engines.networks
    samples = [make_sample(seed) for seed in range(5)]
    times = [901.0, 701.0, 501.0, 301.0, 101.0]
    told: list[DenoisingStep] = []
    predict = networks.predictor(CONDITIONS, steps=5, timesteps=times, full_steps={0, 3}, on_step=told.append)
    found = [predict(sample, timestep) for sample, timestep in zip(samples, times, strict=True)]
    assert [step.component for step in told] == ["unet", "unet_shallow", "unet_shallow", "unet", "unet_shallow"]
    deep = [step.feeds["deep.0"] for step in told if step.component == "unet_shallow"]
    np.testing.assert_array_equal(deep[0], deep[1])
    assert np.abs(deep[1] - deep[2]).max() > 0.1
    for step, output in zip(told, found, strict=True):
        again = networks.session(step.component).run(step.feeds)
        np.testing.assert_array_equal(again["out_sample"], output)
        assert step.seconds > 0
    for which, whole in ((0, 0), (2, 3)):
        given = networks.session("unet").run(told[whole].feeds)["deep.0"]
        np.testing.assert_array_equal(given, deep[which])


def test_whole_unet_at_every_step_is_what_it_is_without_deepcache(engines: Engines) -> None:
    sample = make_sample(7)
    plain = engines.networks.predictor(CONDITIONS, steps=2)
    every = engines.networks.predictor(CONDITIONS, steps=2, full_steps=full_steps(2, 1))
    for timestep in (800.0, 300.0):
        np.testing.assert_array_equal(every(sample, timestep), plain(sample, timestep))


def test_two_runs_in_turn_keep_their_own_features(engines: Engines) -> None:
    def run(seed: int) -> Any:
        predict = engines.networks.predictor(CONDITIONS, steps=2, full_steps={0})
        yield predict(make_sample(seed), 700.0)
        yield predict(make_sample(seed + 1), 600.0)

    alone = [list(run(seed)) for seed in (1, 20)]
    in_turn = list(zip(*[run(seed) for seed in (1, 20)], strict=True))
    for seed in range(2):
        for step in range(2):
            np.testing.assert_array_equal(in_turn[step][seed], alone[seed][step])


def test_the_engine_that_gives_no_numbers_is_named(engines: Engines) -> None:
    predict = engines.networks.predictor(CONDITIONS, steps=2, full_steps={0})
    predict(make_sample(1), 700.0)
    with pytest.raises(NumericalError, match=r"unet_shallow at step 2 of 2 \(timestep 600\) gave NaN"):
        predict(np.full_like(make_sample(1), np.nan), 600.0)


def shallow_specs() -> dict[str, ComponentSpec]:
    deep = TensorSpec("deep.0", "float32", ("B", 7, "H", "W"))
    return {
        "unet": replace(SPEC, outputs=(*SPEC.outputs, deep)),
        "unet_shallow": ComponentSpec("unet_shallow", (SPEC.inputs[0], deep), SPEC.outputs, SIZES),
    }


def change_shallow(**changes: Any) -> dict[str, ComponentSpec]:
    specs = shallow_specs()
    return {**specs, "unet_shallow": replace(specs["unet_shallow"], **changes)}


def test_wiring_of_a_shallow_unet() -> None:
    check_wiring(shallow_specs(), place="here")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"unet_shallow": shallow_specs()["unet_shallow"]}, "unet_shallow has no unet to serve"),
        ({**shallow_specs(), "unet": SPEC}, "nothing provides the input 'deep.0' of unet_shallow"),
        (
            change_shallow(inputs=(*SPEC.inputs[:1], *SPEC.outputs)),
            "nothing provides the input 'out_sample' of unet_sh",
        ),
        (
            change_shallow(inputs=(SPEC.inputs[0], TensorSpec("deep.0", "float32", ("B", 9, "H", "W")))),
            r"unet_shallow takes deep.0 as float32 \['B', 9, 'H', 'W'\], with unet it is float32 \['B', 7, 'H', 'W'\]",
        ),
        (change_shallow(inputs=SPEC.inputs), "unet_shallow takes nothing that the unet gives"),
        (change_shallow(outputs=shallow_specs()["unet"].outputs[1:]), "unet_shallow does not give what the unet gives"),
        (
            change_shallow(outputs=(replace(SPEC.outputs[0], shape=("B", 9, "H", "W")),)),
            "unet_shallow does not give what the unet gives",
        ),
        (
            change_shallow(dimensions={**SIZES, "B": DimensionRange(1, 2, 3)}),
            "unet_shallow and the unet take other ranges of B",
        ),
    ],
)
def test_a_shallow_unet_that_does_not_fit_is_refused(specs: Mapping[str, ComponentSpec], message: str) -> None:
    with pytest.raises(BundleError, match=f"here: {message}.*export the bundle again"):
        check_wiring(specs, place="here")
