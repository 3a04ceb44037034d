"""What the dependency graph says goes together: removing units is what zeroing them is, in every family of UNets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_unets import FAMILIES, make_state, run
from torch import nn

from sdc.compiler.compress.channels import KINDS, ChannelGroup, find_groups
from sdc.compiler.compress.gates import closed_gates
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.load import load_checkpoint
from sdc.engines.errors import InputError

ROUNDING = 2e-5
"""Sums over fewer channels are added in another order; predictions are of order one."""


def random_units(groups: tuple[ChannelGroup, ...], seed: int, multiple: int = 1) -> dict[str, np.ndarray]:
    """For each group any allowed number of any units."""
    random = np.random.default_rng(seed)
    return {
        group.name: np.sort(random.choice(group.units, random.choice(group.kept_units(multiple)), replace=False))
        for group in groups
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_network_is_the_whole_one_with_closed_gates(family: str, seed: int) -> None:
    state = make_state(family)
    groups, whole = find_groups(state.build_empty()), state.build()
    kept = random_units(groups, seed)
    pruned = prune(state, groups, kept)
    with closed_gates(whole, groups, kept):
        expected = run(whole)
    assert pruned.parameters < 0.8 * state.parameters
    assert (run(pruned.build()) - expected).abs().max() < ROUNDING
    assert (run(whole) - expected).abs().max() > 1000 * ROUNDING, "nothing that matters was removed"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_group_is_exact_alone(kind: str) -> None:
    state = make_state()
    groups = tuple(group for group in find_groups(state.build_empty()) if group.kind == kind)
    kept, whole = random_units(groups, 4), state.build()
    with closed_gates(whole, groups, kept):
        expected = run(whole)
    assert (run(prune(state, groups, kept).build()) - expected).abs().max() < ROUNDING
    assert (run(whole) - expected).abs().max() > 50 * ROUNDING


def test_groups_of_tiny_by_hand() -> None:
    """17 residual blocks, 11 transformers with two attentions and a feed-forward each, one time embedding."""
    checkpoint = load_checkpoint("tiny")
    unet = UnetState(checkpoint.config("unet"), {}).build_empty()
    groups = {group.name: group for group in find_groups(unet)}
    kinds = [group.kind for group in groups.values()]
    assert [kinds.count(kind) for kind in KINDS] == [17, 22, 11, 1]
    transformer = "down_blocks.1.attentions.0.transformer_blocks.0"
    heads = groups[f"{transformer}.attn2.to_out.0"]
    assert (heads.units, heads.unit_channels) == (6, 16)
    assert {member.layer.removeprefix(f"{transformer}.attn2."): member.side for member in heads.members} == {
        **dict.fromkeys(("to_q", "to_k", "to_v"), "out"),
        "to_out.0": "in",
    }
    assert heads.unit_parameters == 16 * (96 + 64 + 64 + 96)
    geglu = groups[f"{transformer}.ff.net.2"]
    projection = next(member for member in geglu.members if member.side == "out")
    assert projection.channels[[0, 5, 383]].tolist() == [[0, 384], [5, 389], [383, 767]]
    residual = groups["up_blocks.1.resnets.0.conv2"]
    assert (residual.units, residual.unit_channels) == (32, 3)
    assert {member.layer.rpartition(".")[2] for member in residual.members} == {
        *("conv1", "norm2", "conv2", "time_emb_proj")
    }
    assert residual.unit_parameters == 3 * (224 * 9 + 1 + 2 + 256 + 1 + 96 * 9)


def test_unit_parameters_are_what_goes() -> None:
    state = make_state()
    for group in find_groups(state.build_empty()):
        kept = np.arange(group.units - 1)
        pruned = prune(state, [group], {group.name: kept})
        assert state.parameters - pruned.parameters == group.unit_parameters, group.name


def test_widths_that_are_kept_are_multiples_and_whole_norm_groups() -> None:
    state = make_state()
    for group in find_groups(state.build_empty()):
        for multiple in (1, 8, 16):
            whole, *fewer = group.kept_units(multiple)
            assert whole == group.units
            assert fewer == sorted(fewer, reverse=True)
            assert all(0 < units < group.units for units in fewer)
            if group.kind != "heads":
                assert all(units * group.unit_channels % multiple == 0 for units in fewer)
    assert ChannelGroup("x", "residual", 32, 10, ()).kept_units(8) == (32, 28, 24, 20, 16, 12, 8, 4)
    assert ChannelGroup("x", "residual", 32, 10, ()).kept_units(32) == (32, 16)
    assert ChannelGroup("x", "heads", 8, 40, ()).kept_units(32) == (8, 7, 6, 5, 4, 3, 2, 1)


def test_pruning_goes_on_from_a_pruned_network() -> None:
    state = make_state()
    once = prune(state, groups := find_groups(state.build_empty()), random_units(groups, 6))
    again = find_groups(once.build_empty())
    kept, network = random_units(again, 7), once.build()
    twice = prune(once, again, kept)
    with closed_gates(network, again, kept):
        expected = run(network)
    assert twice.parameters < once.parameters
    assert (run(twice.build()) - expected).abs().max() < ROUNDING
    assert [group.unit_channels for group in again] == [group.unit_channels for group in groups]


def test_a_wrong_member_is_not_exact() -> None:
    """The proof above can fail: with the gate half of GEGLU left at other channels, it does."""
    state = make_state()
    groups = find_groups(state.build_empty())
    group = next(group for group in groups if group.kind == "feed-forward")
    wrong = tuple(
        dataclasses.replace(member, channels=np.sort(member.channels[::-1], axis=1)) if member.side == "out" else member
        for member in group.members
    )
    kept = {group.name: np.arange(10, group.units)}
    whole = state.build()
    with closed_gates(whole, groups, kept):
        expected = run(whole)
    broken = prune(state, [dataclasses.replace(group, members=wrong)], kept)
    assert (run(broken.build()) - expected).abs().max() > 50 * ROUNDING


def test_a_layer_norm_over_the_channels_is_refused() -> None:
    """Its statistics would be others: a norm between a feed-forward's layers, say."""
    empty = make_state().build_empty()
    feed_forward = empty.mid_block.attentions[0].transformer_blocks[0].ff
    feed_forward.net[1] = nn.LayerNorm(feed_forward.net[2].in_features, device="meta")
    with pytest.raises(InputError, match=r"ff\.net\.1, a LayerNorm, takes its statistics"):
        find_groups(empty)


def test_a_norm_whose_groups_are_not_whole_is_refused() -> None:
    empty = make_state().build_empty()
    block = empty.mid_block.resnets[0]
    block.norm2 = nn.Sequential(block.norm2)
    block.norm2.num_channels, block.norm2.num_groups = 48, 48  # claims units of one channel
    with pytest.raises(InputError, match="a GroupNorm, takes its statistics"):
        find_groups(empty)


def test_what_stays_whole_is_not_copied() -> None:
    state = make_state()
    groups = find_groups(state.build_empty())
    kept = {groups[0].name: np.arange(groups[0].units - 1)}
    pruned = prune(state, groups, kept)
    changed = {member.layer for member in groups[0].members}
    for name, tensor in state.weights.items():
        assert (pruned.weights[name] is tensor) == (name.rpartition(".")[0] not in changed or name.endswith("_2.bias"))
    assert prune(state, groups, {}) is state
