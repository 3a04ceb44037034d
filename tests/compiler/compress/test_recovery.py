"""The loss of recovery against its formula, and students with fewer blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_unets import inputs, make_state, run

from sdc.compiler.compress.blocks import remove_blocks
from sdc.compiler.compress.channels import find_groups
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.prune import UnetState, prune
from sdc.compiler.compress.recovery import RecoveryBatch, recovery_loss, stage_outputs
from sdc.engines.errors import InputError


def batch(guidance: tuple[float, ...] = (1.0, 4.0)) -> RecoveryBatch:
    sample, timesteps, states = inputs(rows=5)
    return RecoveryBatch(
        Probe(sample, timesteps, states, sample), inputs(seed=9, rows=len(guidance))[2], torch.tensor(guidance)
    )


def pruned_state() -> UnetState:
    state = make_state()
    groups = find_groups(state.build_empty())
    return prune(state, groups, {group.name: np.arange(group.units // 2) for group in groups})


def test_a_student_that_is_the_teacher_has_no_loss() -> None:
    state = make_state()
    assert recovery_loss(state.build(), state.build(), batch(), feature_weight=1.0).item() == 0


def test_the_loss_is_its_formula() -> None:
    teacher, student, made = make_state().build(), pruned_state().build(), batch()
    probe, pairs = made.probe, slice(0, 2)
    conditional = [net(probe.sample, probe.timesteps, probe.states).sample for net in (student, teacher)]
    unconditional = [
        net(probe.sample[pairs], probe.timesteps[pairs], made.unconditional).sample for net in (student, teacher)
    ]
    guided = []
    for row, scale in enumerate((1.0, 4.0)):
        both = [u[row] + scale * (c[row] - u[row]) for c, u in zip(conditional, unconditional, strict=True)]
        guided.append((both[0] - both[1]).square() / (scale**2 + (1 - scale) ** 2))
    expected = (conditional[0] - conditional[1]).square().mean() + torch.stack(guided).mean()
    found = recovery_loss(student, teacher, made, feature_weight=0.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    with_features = recovery_loss(student, teacher, made, feature_weight=0.5)
    assert with_features.item() > found.item() + 0.01


def test_features_are_what_the_stages_give() -> None:
    unet = make_state().build()
    with stage_outputs(unet) as found:
        run(unet)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert shapes == {
        "down_blocks.0": (3, 24, 5, 3),
        "down_blocks.1": (3, 48, 5, 3),
        "mid_block": (3, 48, 5, 3),
        "up_blocks.0": (3, 48, 10, 6),
        "up_blocks.1": (3, 24, 10, 6),
    }
    assert not any(layer._forward_hooks for layer in unet.modules())


def test_the_gradient_reaches_every_weight_of_the_student_and_none_of_the_teacher() -> None:
    teacher, student = make_state().build(), pruned_state().build().requires_grad_(True)
    recovery_loss(student, teacher, batch(), feature_weight=0.1).backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in student.parameters())
    assert all(each.grad is None for each in teacher.parameters())


@pytest.mark.parametrize(("student", "middle"), [("base", True), ("small", False)])
def test_students_keep_the_weights_of_the_blocks_that_stay(student: str, middle: bool) -> None:
    state = make_state(layers=2)
    small = remove_blocks(state, student)  # type: ignore[arg-type]
    assert run(small.build()).isfinite().all()
    assert small.parameters < 0.75 * state.parameters
    assert any(name.startswith("mid_block") for name in small.weights) == middle
    for there, here in (("0", "0"), ("2", "1")):
        name = "up_blocks.1.resnets.{}.conv1.weight"
        assert small.weights[name.format(here)] is state.weights[name.format(there)]
    loss = recovery_loss(small.build(), state.build(), batch(), feature_weight=0.1)
    assert loss.item() > 0


def test_students_can_be_pruned_but_not_the_other_way_round() -> None:
    small = remove_blocks(make_state(layers=2), "small")
    groups = find_groups(small.build_empty())
    pruned = prune(small, groups, {group.name: np.arange(group.units // 2) for group in groups})
    assert run(pruned.build()).isfinite().all()
    with pytest.raises(InputError, match="this one is pruned already"):
        remove_blocks(pruned, "base")
    with pytest.raises(InputError, match="this one has layers_per_block 1"):
        remove_blocks(make_state(), "base")
    assert remove_blocks(pruned, "same") is pruned
