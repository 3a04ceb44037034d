"""Masks by hand, norms of inputs against the convolutions' own, zeros that training leaves, and what is refused."""

from __future__ import annotations

import pytest
import torch
from small_unets import inputs, make_state, run
from test_importance import probe
from test_recovery import batch
from torch import Tensor

from sdc.compiler.compress.prune import UnetState
from sdc.compiler.compress.recovery import recovery_loss
from sdc.compiler.compress.settings import CompressSettings, Pattern, parse_pattern
from sdc.compiler.compress.sparsity import (
    ChosenLayers,
    apply_masks,
    check_zeros,
    choose_layers,
    describe_sparsity,
    frozen_zeros,
    input_norms,
    make_masks,
)
from sdc.engines.errors import InputError, NumericalError

TWO_OF_FOUR = parse_pattern("2:4")


def sparse_state() -> tuple[UnetState, dict[str, Tensor], ChosenLayers]:
    state = make_state()
    layers = choose_layers(state.build_empty(), in_blocks=True)
    masks = make_masks(state.weights, layers.names, TWO_OF_FOUR, None)
    return apply_masks(state, masks), masks, layers


def test_the_two_largest_of_four_stay() -> None:
    weight = torch.tensor([[1.0, -4, 3, 2, 0.5, 0.1, -0.2, 0.3], [9, 8, -7, 6, 1, 2, 3, -4]])
    masks = make_masks({"a.weight": weight}, ("a",), TWO_OF_FOUR, None)
    assert masks["a.weight"].int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1]]


def test_norms_of_inputs_weigh_in() -> None:
    """Wanda's score: a large weight on a channel that is hardly used goes before a small one on a busy channel."""
    weight = torch.tensor([[1.0, -4, 3, 2]])
    norms = {"a": torch.tensor([10.0, 0.1, 1.0, 2.0], dtype=torch.float64)}
    masks = make_masks({"a.weight": weight}, ("a",), TWO_OF_FOUR, norms)
    assert masks["a.weight"].int().tolist() == [[1, 0, 0, 1]]


def test_blocks_of_a_convolution_are_input_channels_at_one_place() -> None:
    weight = torch.randn(6, 8, 3, 2, generator=torch.Generator().manual_seed(3))
    norms = torch.rand(8, generator=torch.Generator().manual_seed(4)).double()
    stays = make_masks({"a.weight": weight}, ("a",), TWO_OF_FOUR, {"a": norms})["a.weight"]
    assert stays.shape == weight.shape
    for output, begin, y, x in [(0, 0, 0, 0), (5, 4, 2, 1), (3, 4, 0, 1)]:
        block = slice(begin, begin + 4)
        scores = weight[output, block, y, x].abs() * norms[block]
        assert set(stays[output, block, y, x].nonzero().flatten().tolist()) == set(scores.topk(2).indices.tolist())


@pytest.mark.parametrize(("by_data", "expected"), [(False, [[0, 0, 0, 0], [0, 1, 1, 1]]), (True, [[0, 0, 1, 1]] * 2)])
def test_a_share_is_of_the_layer_or_of_each_output(by_data: bool, expected: list[list[int]]) -> None:
    """By magnitude the smallest of a layer go, wherever; by activation, of each output's."""
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0]])
    norms = {"a": torch.ones(4).double()} if by_data else None
    share = 0.5 if by_data else 5 / 8
    stays = make_masks({"a.weight": weight}, ("a",), Pattern(share, structured=False), norms)["a.weight"]
    assert stays.int().tolist() == expected


def test_layers_that_stay_dense_are_named_with_a_reason() -> None:
    unet = make_state().build_empty()
    layers = choose_layers(unet, in_blocks=True)
    reasons = {name: reason for name, reason in layers.dense.items() if not name.endswith((".to_k", ".to_v"))}
    assert reasons == {"conv_in": "the first convolution", "conv_out": "the last convolution"}
    assert layers.dense["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == "18 inputs are no multiple of 4"
    kinds = {type(unet.get_submodule(name)).__name__ for name in layers.names}
    assert kinds == {"Conv2d", "Linear"}
    everywhere = choose_layers(unet, in_blocks=False)
    assert list(everywhere.dense) == ["conv_in", "conv_out"]
    assert len(everywhere.names) == len(layers.names) + len(layers.dense) - 2


def test_norms_are_those_of_what_the_layers_get() -> None:
    """A convolution and a linear layer against outputs of the module before; rows in parts add up."""
    unet, made = make_state().build(), probe(5)
    names = ("up_blocks.0.upsamplers.0.conv", "time_embedding.linear_2", "conv_in")
    found = input_norms(unet, names, made, rows=2)
    assert not any(layer._forward_pre_hooks for layer in unet.modules())
    torch.testing.assert_close(found["conv_in"].float(), made.sample.square().sum((0, 2, 3)).sqrt())
    embedding = unet.time_embedding
    hidden = embedding.act(embedding.linear_1(unet.time_proj(made.timesteps)))
    torch.testing.assert_close(found["time_embedding.linear_2"].float(), hidden.square().sum(0).sqrt())
    assert found["up_blocks.0.upsamplers.0.conv"].shape == (48,)
    whole = input_norms(unet, names, made, rows=5)
    for name in names:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=0)


def test_norms_of_an_attentions_projection_are_over_all_tokens() -> None:
    """to_k of the cross-attention gets the captions' states, once for every row."""
    made = probe(3)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    found = input_norms(make_state().build(), (name,), made, rows=2)[name]
    torch.testing.assert_close(found.float(), inputs()[2].square().sum((0, 1)).sqrt())


def test_a_sparse_network_has_its_zeros_and_nothing_else_changed() -> None:
    state, (sparse, masks, layers) = make_state(), sparse_state()
    check_zeros(sparse.weights, masks, TWO_OF_FOUR)
    for name, weight in state.weights.items():
        if name in masks:
            assert torch.equal(sparse.weights[name], weight * masks[name])
            assert float(masks[name].float().mean()) == 0.5
        else:
            assert torch.equal(sparse.weights[name], weight)
    assert (run(sparse.build()) - run(state.build())).abs().max() > 0.01
    described = describe_sparsity(sparse, layers, masks)
    assert set(described["layers"].values()) == {0.5}
    assert described["zeros"] == sum(mask.numel() // 2 for mask in masks.values())


def test_zeros_are_zero_after_every_step_of_training() -> None:
    """All others move; the norm that gradients are cut by is of theirs alone."""
    (sparse, masks, _), teacher = sparse_state(), make_state().build()
    student = sparse.build()
    student.load_state_dict({name: each.clone() for name, each in sparse.weights.items()}, assign=True)
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.0)
    with frozen_zeros(student, masks):
        for _ in range(3):
            optimizer.zero_grad()
            recovery_loss(student, teacher, batch(), feature_weight=0.1).backward()
            optimizer.step()
            check_zeros(dict(student.state_dict()), masks, TWO_OF_FOUR)
    for name, mask in masks.items():
        weight = student.get_parameter(name)
        assert weight.grad is not None
        assert not weight.grad[~mask].any()
        assert not torch.signbit(weight.detach()[~mask]).any(), "-0 is no zero to those who look at bits"
        assert (weight.detach()[mask] != sparse.weights[name][mask]).float().mean() > 0.9
    assert not any(each._backward_hooks for each in student.parameters())
    recovery_loss(student, teacher, batch(), feature_weight=0.1).backward()
    optimizer.step()
    with pytest.raises(NumericalError, match="not 2:4 sparse"):
        check_zeros(dict(student.state_dict()), masks, TWO_OF_FOUR)


def test_the_check_names_the_first_block_that_fails() -> None:
    sparse, masks, _ = sparse_state()
    name = "down_blocks.0.resnets.0.conv2.weight"
    broken = sparse.weights[name].clone()
    broken[5, 8:12, 2, 1] = torch.tensor([0.0, 1, 2, 3])
    broken[7, 0:4, 0, 0] = 1.0
    message = rf"{name} is not 2:4 sparse: of inputs 8 to 11 of output 5 at \(2, 1\) of its kernel more than 2"
    with pytest.raises(NumericalError, match=message):
        check_zeros({**sparse.weights, name: broken}, masks, TWO_OF_FOUR)


def test_the_check_finds_a_zero_that_moved_within_its_block() -> None:
    sparse, masks, _ = sparse_state()
    name = "time_embedding.linear_1.weight"
    moved = sparse.weights[name].clone()
    stays, goes = masks[name][3, 4:8].nonzero()[0, 0], (~masks[name])[3, 4:8].nonzero()[0, 0]
    moved[3, 4 + goes], moved[3, 4 + stays] = 0.5, 0.0
    with pytest.raises(NumericalError, match=rf"{name} has 0.5 at \(3, {4 + goes}\), where its mask has zero"):
        check_zeros({**sparse.weights, name: moved}, masks, TWO_OF_FOUR)
    with pytest.raises(NumericalError, match="where its mask has zero"):
        check_zeros({name: moved}, {name: masks[name]}, Pattern(0.5, structured=False))


@pytest.mark.parametrize("text", ["0", "1", "nan", "4:8", "half", "-0.5", ""])
def test_what_is_no_sparsity(text: str) -> None:
    with pytest.raises(InputError, match="is no sparsity; give 2:4, or a share between 0 and 1"):
        CompressSettings(sparsity=text)


def test_what_settings_follow_from_a_sparsity() -> None:
    alone = CompressSettings(parameters=0.0, sparsity="2:4", sparsity_scores="magnitude", recover_steps=0)
    assert not alone.needs_data
    assert alone.phases == (0,)
    assert CompressSettings(parameters=0.0, sparsity="2:4", recover_steps=0).needs_data
    assert CompressSettings(sparsity="2:4", rounds=3, round_steps=5, recover_steps=7).phases == (5, 5, 7)
    with pytest.raises(InputError, match="share of parameters must be between 0 and 1, found 0"):
        CompressSettings(parameters=0.0)
    with pytest.raises(InputError, match="unknown sparsity_scores 'wanda'; choose from activation, magnitude"):
        CompressSettings(sparsity="2:4", sparsity_scores="wanda")  # type: ignore[arg-type]
