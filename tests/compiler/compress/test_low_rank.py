"""Ranks by energy and under a budget, weights against NumPy's singular values, training within a rank, the check."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from small_unets import make_state, run
from test_importance import probe
from test_recovery import batch

from sdc.compiler.compress.low_rank import (
    apply_spans,
    check_ranks,
    choose_ranks,
    choose_spans,
    describe_low_rank,
    output_moments,
    project_parameters,
    search_energy,
    spectra_of,
    weight_moments,
)
from sdc.compiler.compress.prune import UnetState
from sdc.compiler.compress.recovery import move_average, recovery_loss
from sdc.compiler.compress.settings import CompressSettings, Ranks
from sdc.compiler.compress.sparsity import choose_layers
from sdc.engines.errors import InputError, NumericalError
from sdc.passes.simplify.factorise_weights import LOW_RANK, low_rank_factors

STATE = make_state()
NAMES = choose_layers(STATE.build_empty(), in_blocks=False).names


def rank_of(weight: torch.Tensor) -> int:
    """The rank that an export finds."""
    found = low_rank_factors(weight.flatten(1).numpy(), 1e-5)
    return min(weight.flatten(1).shape) if found is None else found[0].shape[1]


def test_plain_is_the_truncated_singular_value_decomposition() -> None:
    name = "down_blocks.0.resnets.0.conv2"
    matrix = STATE.weights[f"{name}.weight"].flatten(1).numpy()
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    layers = choose_spans(spectra_of(STATE.weights, (name,), None), energy=0.8)
    rank = layers.spans[f"{name}.weight"].shape[1]
    energy = np.cumsum(s**2) / np.sum(s**2)
    assert energy[rank - 2] < 0.8 <= energy[rank - 1]
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found = apply_spans(STATE, layers.spans).weights[f"{name}.weight"]
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)


def test_moments_are_of_what_the_layers_give_without_bias() -> None:
    """conv_in's input is the probe itself, so that its products can be made here; rows in parts add up."""
    made, unet = probe(5), STATE.build()
    found = output_moments(unet, ("conv_in", "time_embedding.linear_1"), made, rows=2)
    assert not any(layer._forward_hooks for layer in unet.modules())
    given = torch.nn.functional.conv2d(made.sample, unet.conv_in.weight, padding=1).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found["conv_in"].float(), given.T @ given, rtol=1e-4, atol=1e-3)
    given = unet.time_proj(made.timesteps) @ unet.time_embedding.linear_1.weight.T
    torch.testing.assert_close(found["time_embedding.linear_1"].float(), given.T @ given, rtol=1e-4, atol=1e-3)


def test_by_activation_no_weight_of_the_rank_changes_the_result_less() -> None:
    """Against the closed form: the singular values of W S, S Sᵀ the inputs' second moments, that are cut off."""
    random = np.random.default_rng(4)
    weight = random.standard_normal((24, 32))
    x = random.standard_normal((500, 32)) * np.geomspace(10, 0.01, 32)
    y = x @ weight.T
    weights = {"a.weight": torch.from_numpy(weight).float()}
    layers = choose_spans(spectra_of(weights, ("a",), {"a": torch.from_numpy(y.T @ y)}), energy=0.95)
    rank = layers.spans["a.weight"].shape[1]
    changed = apply_spans(UnetState({}, weights), layers.spans).weights["a.weight"].numpy()
    s = np.linalg.svd(weight @ np.linalg.cholesky(x.T @ x), compute_uv=False)
    assert 2 <= rank < 13
    assert np.linalg.norm(x @ changed.T - y) == pytest.approx(np.sqrt(np.sum(s[rank:] ** 2)), rel=1e-3)
    plain = choose_spans(spectra_of(weights, ("a",), None), energy=0.5).spans["a.weight"].double().numpy()[:, -rank:]
    assert np.linalg.norm(x @ (plain @ (plain.T @ weight)).T - y) > 1.5 * np.linalg.norm(x @ changed.T - y)


def test_ranks_that_save_nothing_stay_whole() -> None:
    layers = choose_spans(spectra_of(STATE.weights, NAMES, None), energy=0.6)
    assert set(layers.dense) | {name.removesuffix(".weight") for name in layers.spans} == set(NAMES)
    for name, span in layers.spans.items():
        outputs, inputs = STATE.weights[name].flatten(1).shape
        assert span.shape[1] * (outputs + inputs) < outputs * inputs
        torch.testing.assert_close(span.T @ span, torch.eye(span.shape[1]), atol=1e-5, rtol=0)
    whole = choose_spans(spectra_of(STATE.weights, ("time_embedding.linear_2",), None), energy=0.9999)
    assert whole.spans == {}
    (reason,) = whole.dense.values()
    assert re.fullmatch("rank 9[0-9] of 96 saves nothing", reason)


def test_an_export_finds_the_ranks_and_the_configuration_names_them() -> None:
    layers = choose_spans(spectra_of(STATE.weights, NAMES, None), energy=0.6)
    low = apply_spans(STATE, layers.spans)
    check_ranks(low.weights, layers.spans)
    ranks = low.config[LOW_RANK]
    assert {name: rank_of(low.weights[f"{name}.weight"]) for name in ranks} == ranks
    described = describe_low_rank(low, layers)
    assert described["in_factors"] == sum(
        rank * sum(STATE.weights[f"{name}.weight"].flatten(1).shape) for name, rank in ranks.items()
    )
    assert 0 < described["in_factors"] < described["weights"]
    untouched = [name for name in STATE.weights if name not in layers.spans]
    assert all(low.weights[name] is STATE.weights[name] for name in untouched)
    assert (run(low.build()) - run(STATE.build())).abs().max() > 0.01


def test_training_stays_within_the_rank() -> None:
    """After every step of an optimiser whose own steps would leave it."""
    spans = choose_spans(spectra_of(STATE.weights, NAMES, None), energy=0.6).spans
    low, teacher = apply_spans(STATE, spans), STATE.build()
    student = low.build()
    student.load_state_dict({name: each.clone() for name, each in low.weights.items()}, assign=True)
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = recovery_loss(student, teacher, batch(), feature_weight=0.1)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        with pytest.raises(NumericalError, match=r"is not of rank \d+: .* of its norm is outside"):
            check_ranks(dict(student.state_dict()), spans)
        project_parameters(student, spans)
        check_ranks(dict(student.state_dict()), spans)
    assert losses[-1] < losses[0]
    name = "down_blocks.0.resnets.0.conv2.weight"
    assert rank_of(student.state_dict()[name]) == spans[name].shape[1]


def test_an_average_of_thousands_of_small_steps_stays_within_the_rank() -> None:
    """Rounding to float32 alone carries it off the span, further than is allowed."""
    generator = torch.Generator().manual_seed(0)
    student, kept, drifting = (torch.nn.Linear(96, 96, bias=False) for _ in range(3))
    span = torch.linalg.qr(torch.randn(96, 20, generator=generator))[0]
    spans, none = {"weight": span}, {}
    with torch.no_grad():
        student.weight.copy_(0.05 * torch.randn(96, 96, generator=generator))
    project_parameters(student, spans)
    for average in (kept, drifting):
        average.load_state_dict(student.state_dict())
    for _ in range(6000):
        with torch.no_grad():
            student.weight.add_(1e-6 * torch.randn(96, 96, generator=generator))
        project_parameters(student, spans)
        move_average(kept, student, decay=0.999, spans=spans)
        move_average(drifting, student, decay=0.999, spans=none)
    check_ranks(kept.state_dict(), spans)
    torch.testing.assert_close(kept.weight, drifting.weight, atol=1e-4, rtol=0)
    with pytest.raises(NumericalError, match="is not of rank 20"):
        check_ranks(drifting.state_dict(), spans)


def test_moments_of_weights_are_their_gram_matrix() -> None:
    weight = STATE.weights["conv_out.weight"]
    flat = weight.double().flatten(1)
    torch.testing.assert_close(weight_moments(weight), flat @ flat.T)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low_rank": "1"}, "energy that is kept must be between 0 and 1, found '1'; give for example 0.99, or"),
        ({"low_rank": "nan"}, "energy that is kept must be between 0 and 1, found 'nan'"),
        ({"low_rank": "1db"}, "energy that is kept must be between 0 and 1, found '1db'"),
        ({"low_rank": "0dB"}, "budget for ranks must be above 0 dB, found '0dB'; give for example 1dB"),
        ({"low_rank": "-1dB"}, "budget for ranks must be above 0 dB, found '-1dB'"),
        ({"low_rank": "infdB"}, "budget for ranks must be above 0 dB, found 'infdB'"),
        ({"low_rank": "dB"}, "budget for ranks must be above 0 dB, found 'dB'"),
        ({"low_rank": "0.9", "sparsity": "2:4"}, "has no zeros of its own; give --sparsity or --low-rank, not both"),
        ({"low_rank": "0.9", "low_rank_by": "weights"}, "unknown low_rank_by 'weights'; choose from activation, plain"),
    ],
)
def test_what_makes_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompressSettings(**values)  # type: ignore[arg-type]


def test_what_settings_follow_from_a_low_rank() -> None:
    plain = CompressSettings(parameters=0.0, low_rank="0.9", low_rank_by="plain", recover_steps=0)
    assert (plain.needs_data, plain.phases) == (False, (0,))
    assert plain.ranks == Ranks(0.9, None)
    assert CompressSettings(parameters=0.0, low_rank="0.9", recover_steps=0).needs_data
    budget = CompressSettings(parameters=0.0, low_rank="0.5dB", low_rank_by="plain", recover_steps=0)
    assert budget.ranks == Ranks(None, 0.5)
    assert budget.needs_data


@pytest.mark.parametrize("limit", [3e-5, 0.01, 0.07, 0.9])
def test_the_search_ends_next_to_the_limit(limit: float) -> None:
    """dB that grow with what is lost of the energy: within a factor of 1.2 of it in six measurements."""
    found, trials = search_energy(lambda energy: 40 * (1 - energy), 40 * limit)
    assert len(trials) == 6
    assert found in trials
    assert limit / 1.2 <= 1 - found.energy <= limit


def test_a_budget_that_nothing_keeps_is_refused() -> None:
    """Also where quality cannot be told at all."""
    hint = "of the layers' energy; allow more dB, with another --work, or leave"
    with pytest.raises(InputError, match=f"may be 0.01 dB less, and is 0.5 dB less with 0.99998[0-9] {hint}"):
        search_energy(lambda _: 0.5, 0.01)
    with pytest.raises(InputError, match="may be 5 dB less, and is nan dB less"):
        search_energy(lambda _: math.nan, 5.0)


def test_ranks_keep_to_a_budget_and_smaller_ones_would_not() -> None:
    """The truth is what the network predicts, with noise, so that every change of the network costs."""
    whole, names, budget = STATE.build(), NAMES[::3], 0.5
    truth = run(whole) + 0.05 * torch.randn(run(whole).shape, generator=torch.Generator().manual_seed(1))
    moments = output_moments(whole, names, probe(5), rows=5)
    lines: list[str] = []

    def snr_db(state: UnetState) -> float:
        return -10 * math.log10(float((run(state.build()) - truth).square().mean()))

    layers, found = choose_ranks(STATE, names, moments, Ranks(None, budget), snr_db=snr_db, tell=lines.append)
    less = choose_spans(spectra_of(STATE.weights, names, moments), energy=1 - 1.2 * (1 - found["energy"]))
    losses = [snr_db(STATE) - snr_db(apply_spans(STATE, each.spans)) for each in (layers, less)]
    assert found["lost_db"] == pytest.approx(losses[0], abs=1e-6)
    assert 0 < losses[0] <= budget < losses[1]
    assert found["weights"] > found["in_factors"]
    assert len(found["trials"]) == len(lines) == 6
    assert re.fullmatch(r"0\.\d{6} of the energy, \d+ layers of low rank: the SNR is -?\d+\.\d{3} dB less", lines[0])
