"""Gate gradients against finite differences; the three measures against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_unets import inputs, make_state
from torch import Tensor, nn

from sdc.compiler.compress.channels import ChannelGroup, find_groups
from sdc.compiler.compress.gates import GateGradients
from sdc.compiler.compress.importance import best_units, gate_scores, magnitudes
from sdc.compiler.compress.probes import Probe, make_probe, spread_timesteps
from sdc.compiler.compress.prune import UnetState, prune

STATE = make_state()
GROUPS = find_groups(STATE.build_empty())
ONE_OF_EACH = [next(group for group in GROUPS if group.kind == kind) for kind in dict.fromkeys(g.kind for g in GROUPS)]


def by_scaling(group: ChannelGroup, unit: int, size: float) -> Tensor:
    """The prediction with what is read of one unit scaled by 1 + size, in float64."""
    unet = STATE.build().double()
    layer = unet.get_submodule(group.name)
    part = slice(unit * group.unit_channels, (unit + 1) * group.unit_channels)
    layer.weight.data = layer.weight.data.clone()  # the state's own otherwise
    layer.weight.data[:, part] *= 1 + size
    sample, timesteps, states = inputs()
    with torch.no_grad():
        prediction: Tensor = unet(sample.double(), timesteps, states.double()).sample
    return prediction


def derivative(group: ChannelGroup, unit: int) -> Tensor:
    """Of the prediction by the gate, by central differences."""
    return (by_scaling(group, unit, 1e-4) - by_scaling(group, unit, -1e-4)) / 2e-4


def probe(rows: int = 3) -> Probe:
    sample, timesteps, states = inputs(rows=rows)
    return Probe(sample, timesteps, states, torch.randn(sample.shape, generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("group", ONE_OF_EACH, ids=lambda group: group.kind)
def test_gate_gradients_are_derivatives_of_each_row(group: ChannelGroup) -> None:
    unet = STATE.build()
    sample, timesteps, states = inputs()
    direction = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    with GateGradients(unet, GROUPS) as gates:
        unet(sample.requires_grad_(), timesteps, states).sample.backward(direction)
        found = gates.take()[group.name]
    assert found.shape == (3, group.units)
    for unit in (0, group.units - 1):
        expected = (derivative(group, unit) * direction).sum((1, 2, 3)).float()
        torch.testing.assert_close(found[:, unit], expected, rtol=1e-3, atol=1e-3)
    assert not any(layer._forward_pre_hooks for layer in unet.modules())


@pytest.mark.parametrize("group", ONE_OF_EACH, ids=lambda group: group.kind)
def test_taylor_is_the_mean_size_of_the_losss_derivative(group: ChannelGroup) -> None:
    made = probe()
    found = gate_scores(STATE.build(), GROUPS, made, importance="taylor", rows=2, seed=0)[group.name]
    prediction = by_scaling(group, 0, 0.0)
    change = 2 * (prediction - made.truth) * derivative(group, 1)
    assert found[1] == pytest.approx(float(change.mean((1, 2, 3)).abs().mean()), rel=1e-3)


def test_fisher_is_the_mean_square_of_the_predictions_derivative() -> None:
    """An estimate over random directions: many of them, and 4 standard errors of the mean of squared normals."""
    group, made = ONE_OF_EACH[0], probe()
    unet, draws = STATE.build(), 300
    found = [
        gate_scores(unet, [group], made, importance="fisher", rows=3, seed=seed)[group.name][:4]
        for seed in range(draws)
    ]
    for unit in range(4):
        expected = float(derivative(group, unit).square().mean())
        assert np.mean(found, 0)[unit] == pytest.approx(expected, rel=4 * np.sqrt(2 / draws))


def test_scores_do_not_depend_on_how_rows_are_grouped() -> None:
    one, three = (
        gate_scores(STATE.build(), GROUPS, probe(5), importance="taylor", rows=rows, seed=0) for rows in (1, 5)
    )
    for name, found in one.items():
        np.testing.assert_allclose(found, three[name], rtol=1e-3, atol=1e-7)


def test_magnitude_is_the_mean_square_of_what_would_go() -> None:
    scores = magnitudes(STATE.build(), GROUPS)
    for group in ONE_OF_EACH:
        for unit in (0, group.units - 1):
            kept = {group.name: np.delete(np.arange(group.units), unit)}
            before, after = (_squares(state) for state in (STATE, prune(STATE, [group], kept)))
            assert scores[group.name][unit] == pytest.approx((before - after) / group.unit_parameters, rel=1e-4)


def _squares(state: UnetState) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in state.weights.values())


def test_a_dead_unit_scores_zero() -> None:
    group = ONE_OF_EACH[1]
    unet = STATE.build()
    layer = unet.get_submodule(group.name)
    assert isinstance(layer, nn.Linear)
    layer.weight.data = layer.weight.data.clone()
    layer.weight.data[:, : group.unit_channels] = 0
    found = gate_scores(unet, [group], probe(), importance="fisher", rows=3, seed=1)[group.name]
    assert found[0] == 0
    assert (found[1:] > 0).all()


def test_best_units_are_in_order_and_equals_stay_first() -> None:
    assert best_units(np.array([3.0, 1.0, 5.0, 3.0, 3.0]), 3).tolist() == [0, 2, 3]


def test_probes_are_the_forward_process() -> None:
    generator = torch.Generator().manual_seed(4)
    clean, noise = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    signal = torch.tensor([0.9, 0.64, 0.1], dtype=torch.float64)
    states, timesteps = torch.zeros(2, 7, 3), torch.tensor([1, 1])
    made = {
        kind: make_probe(clean, noise, timesteps, states, signal=signal, prediction_type=kind)
        for kind in ("epsilon", "v_prediction", "sample")
    }
    torch.testing.assert_close(made["epsilon"].sample, 0.8 * clean + 0.6 * noise)
    assert torch.equal(made["epsilon"].truth, noise)
    assert torch.equal(made["sample"].truth, clean)
    torch.testing.assert_close(made["v_prediction"].truth, 0.8 * noise - 0.6 * clean)


def test_timesteps_cover_the_schedule() -> None:
    found = spread_timesteps(8, 1000, torch.Generator().manual_seed(1))
    assert found.sort().values.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert found.tolist() != found.sort().values.tolist()
