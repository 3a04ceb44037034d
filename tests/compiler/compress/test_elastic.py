"""Units that stay switched off: which they are, that they count for nothing, and that a LoRA switches them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_unets import FAMILIES, inputs, make_state, run

from sdc.compiler.compress.channels import find_groups
from sdc.compiler.compress.elastic import (
    ELASTIC_FILE,
    ElasticChannels,
    choose_elastic,
    close_units,
    columns_of,
    lora_of_units,
    open_units,
    read_elastic,
)
from sdc.compiler.compress.gates import units_off
from sdc.compiler.compress.importance import magnitudes
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.compress.restore import STEPS, choose_units, halves, predicted_changes, prompt_errors, shift_of
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.compiler.load.lora_files import read_lora_layers
from sdc.engines.errors import InputError


def every_second_off(state: UnetState) -> dict[str, list[list[int]]]:
    """Of every group, the units of odd numbers."""
    return {
        group.name: [
            list(range(unit * group.unit_channels, (unit + 1) * group.unit_channels))
            for unit in range(1, group.units, 2)
        ]
        for group in find_groups(state.build_empty())
        if group.units > 1
    }


def elastic_of(state: UnetState, off: dict[str, list[list[int]]], errors: tuple[float, ...] = ()) -> ElasticChannels:
    return ElasticChannels(off, columns_of(state, off), "tiny", "trained", "0a", 2.0, (5, 10, 6), STEPS, errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_that_is_off_counts_as_one_that_was_removed(family: str) -> None:
    state = make_state(family)
    off, groups = every_second_off(state), find_groups(state.build_empty())
    assert {group.kind for group in groups if group.name in off} >= {"residual", "heads", "feed-forward"}
    removed = prune(state, groups, {group.name: np.arange(0, group.units, 2) for group in groups if group.name in off})
    expected = run(removed.build())
    assert torch.allclose(run(close_units(state, off).build()), expected, atol=1e-5)
    whole = state.build()
    with units_off(whole, off):
        assert torch.allclose(run(whole), expected, atol=1e-5)
    assert not torch.allclose(run(whole), expected, atol=1e-3), "gates stay"


def test_the_least_important_of_the_units_that_stay_are_off() -> None:
    state = make_state()
    groups = find_groups(state.build_empty())
    scores = magnitudes(state.build(), groups)
    kept = {group.name: group.units // 2 for group in groups if group.kind == "feed-forward"}
    off = choose_elastic(groups, scores, kept, 0.1)
    assert set(off) == set(kept)
    for group in groups:
        if group.name not in off:
            continue
        best_first = np.argsort(-scores[group.name], kind="stable")
        stay = np.sort(best_first[: group.units // 2])
        expected = best_first[group.units // 2 - max(1, round(0.1 * group.units)) : group.units // 2]
        assert sorted(stay[[channel for (channel,) in off[group.name]]]) == sorted(expected)
    assert choose_elastic(groups, scores, kept, 0.0) == {}
    one_stays = {groups[0].name: 1}
    assert choose_elastic(groups, scores, one_stays, 0.5) == {}


def test_a_lora_switches_units_on_to_the_bit(tmp_path: Path) -> None:
    state = make_state()
    off = every_second_off(state)
    closed, elastic = close_units(state, off), elastic_of(state, off)
    every = {layer: range(len(units)) for layer, units in off.items()}
    save_file(lora_of_units(elastic, every, state.build()), tmp_path / "on.safetensors")
    for name, layer in read_lora_layers(tmp_path / "on.safetensors").items():
        weight = f"{name.removeprefix('unet.')}.weight"
        opened = closed.weights[weight] + layer.product().reshape(closed.weights[weight].shape)
        assert torch.equal(opened, state.weights[weight]), name
    some = {layer: [0] for layer in off}
    save_file(lora_of_units(elastic, some, state.build()), tmp_path / "some.safetensors")
    for name, layer in read_lora_layers(tmp_path / "some.safetensors").items():
        path = name.removeprefix("unet.")
        changed = layer.product().reshape(state.weights[f"{path}.weight"].shape)
        alive = changed.flatten(2).any(2).any(0) if changed.ndim == 4 else changed.any(0)
        assert set(alive.nonzero().flatten().tolist()) <= set(off[path][0])
        assert alive.any()


def test_the_file_holds_what_is_off(tmp_path: Path) -> None:
    state = make_state()
    off = every_second_off(state)
    elastic_of(state, off, (0.5, 0.25)).save(tmp_path)
    found = read_elastic(tmp_path)
    assert (found.off, found.errors, found.teacher, found.teacher_digest) == (off, (0.5, 0.25), "tiny", "0a")
    assert (found.size, found.steps, found.guidance_scale) == ((5, 10, 6), STEPS, 2.0)
    network = close_units(state, off).build()
    open_units(network, found)
    assert all(torch.equal(weight, state.weights[name]) for name, weight in network.state_dict().items())


def test_files_that_are_no_such_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no channels that are switched off"):
        read_elastic(tmp_path)
    state = make_state()
    off = every_second_off(state)
    elastic_of(state, off).save(tmp_path)
    with pytest.raises(InputError, match=f"{ELASTIC_FILE} does not fit the UNet beside it: channels of .* are not off"):
        open_units(state.build(), read_elastic(tmp_path))
    small = prune(state, (groups := find_groups(state.build_empty())), {groups[0].name: np.arange(1)})
    with pytest.raises(InputError, match=f"{ELASTIC_FILE} does not fit the UNet beside it"):
        open_units(small.build(), read_elastic(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / ELASTIC_FILE)
    with pytest.raises(InputError, match="was not written by"):
        read_elastic(tmp_path)


def probe_of(network: torch.nn.Module, prompts: int = 4) -> Probe:
    """What a network answers, as the truth."""
    parts = [inputs(seed=seed, rows=STEPS // 2) for seed in range(2 * prompts)]
    sample, timesteps, states = (torch.cat(each) for each in zip(*parts, strict=True))
    with torch.no_grad():
        return Probe(sample, timesteps, states, network(sample, timesteps, states).sample)


def test_predicted_changes_are_those_of_small_units() -> None:
    """Where a unit's weights are small the prediction is linear in its gate."""
    state = make_state()
    layer = "mid_block.resnets.0.conv2"
    off = {layer: every_second_off(state)[layer]}
    small = close_units(state, off).weights[f"{layer}.weight"]
    weights = {**state.weights, f"{layer}.weight": small + 0.05 * (state.weights[f"{layer}.weight"] - small)}
    network = UnetState(state.config, weights).build()
    probe = probe_of(make_state(seed=6).build())
    changes = predicted_changes(network, off, probe)[layer]
    power = float(probe.truth.square().mean())
    for number in range(len(off[layer])):
        rest = {layer: [unit for index, unit in enumerate(off[layer]) if index != number]}
        errors = [squared_error(network, closed, probe) for closed in (off, rest)]
        assert changes[number] == pytest.approx(errors[1] - errors[0], rel=0.2, abs=1e-6 * power)


@torch.no_grad()
def squared_error(network: torch.nn.Module, off: dict[str, list[list[int]]], probe: Probe) -> float:
    with units_off(network, off):
        predicted = network(probe.sample, probe.timesteps, probe.states).sample
    return float((predicted - probe.truth).square().mean())


def test_units_that_the_teacher_has_pay_and_a_spoilt_one_does_not() -> None:
    state = make_state()
    off = every_second_off(state)
    teacher = state.build()
    spoilt = "up_blocks.1.resnets.0.conv2"
    weights = dict(state.weights)
    (channel, *_) = off[spoilt][0]
    weights[f"{spoilt}.weight"] = weights[f"{spoilt}.weight"].clone()
    weights[f"{spoilt}.weight"][:, channel] *= -20
    student = UnetState(state.config, weights)
    probe = probe_of(teacher, prompts=8)
    found = choose_units(
        student.build(), elastic_of(student, off, tuple(0.001 for _ in range(20))), probe, tell=[].append
    )
    assert found.prompts == 8
    assert 0 not in found.chosen.get(spoilt, ())
    assert found.error_chosen < found.error
    assert found.error_chosen < found.error_open
    assert found.shifted
    assert "units pay: error" in found.to_text()
    assert "prompts of another distribution" in found.to_text()


def test_prompts_that_take_turns_are_not_split_along_them() -> None:
    """The evaluation's prompts have a black and a white background in turn."""
    prompts = prompts_of_model(JUDGED_MODEL, 80)
    assert {prompt.split()[-2] for prompt in prompts[::2]} == {"black"}
    seeking, checking = halves(len(prompts))
    assert sorted([*seeking, *checking]) == list(range(80))
    for half in (seeking, checking):
        assert len(half) == 40
        assert 10 < sum("black" in prompts[number] for number in half) < 30


def test_nothing_is_switched_on_where_nothing_pays() -> None:
    """The teacher is the network with all units off."""
    state = make_state()
    off = every_second_off(state)
    probe = probe_of(close_units(state, off).build())
    found = choose_units(state.build(), elastic_of(state, off), probe, tell=[].append)
    assert found.chosen == {}
    assert found.error_chosen == found.error
    assert found.ratio is None
    assert not found.shifted
    assert "no bundle is written" in found.to_text()


def test_errors_are_relative_and_of_each_prompt() -> None:
    network = make_state().build()
    probe = probe_of(network)
    assert max(prompt_errors(network, probe)) < 1e-9
    truth = probe.truth.clone()
    truth[:STEPS] *= 2
    changed = Probe(probe.sample, probe.timesteps, probe.states, truth)
    found = prompt_errors(network, changed)
    assert found[0] == pytest.approx(0.25, rel=1e-5)
    assert max(found[1:]) < 1e-9


def test_shifts() -> None:
    random = np.random.default_rng(1)
    same, again = (np.exp(random.normal(size=40)) for _ in range(2))
    ratio, probability = shift_of(same, again)
    assert probability > 0.05
    assert ratio == pytest.approx(float(np.exp(np.log(again).mean() - np.log(same).mean())))
    ratio, probability = shift_of(same, 3 * again)
    assert ratio > 2
    assert probability < 0.001
    assert shift_of([0.0, 0.0], [0.0, 0.0]) == (1.0, 1.0)
