"""Each fusion, broken where it reads a site; what its operator computes is broken in `test_broken_rewrites`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from broken import Broken, Case, attribute, check_noticed, names, operand, operand_values, swapped
from equality import Feeds, make_model
from small_graphs import ATTENTION, feed_resnet, make_attention, make_resnet
from test_broken_rewrites import BROKEN, GRAPHS
from test_fuse_attention import FEEDS as ATTENTION_FEEDS
from test_fuse_attention import masked
from test_fuse_group_norm_neighbours import AFFINE, FLAT, FLAT_FEEDS

from sdc.passes import domain
from sdc.passes.base import Pass
from sdc.passes.fusion.fuse_add_group_norm import FuseAddGroupNorm
from sdc.passes.fusion.fuse_add_group_norm_silu import FuseAddGroupNormSilu
from sdc.passes.fusion.fuse_add_layer_norm import FuseAddLayerNorm
from sdc.passes.fusion.fuse_attention import FuseAttention
from sdc.passes.fusion.fuse_bias_add import FuseBiasAdd
from sdc.passes.fusion.fuse_bias_geglu import FuseBiasGeGlu
from sdc.passes.fusion.fuse_concat_group_norm_silu import FuseConcatGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu import FuseGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu_add import FuseGroupNormSiluAdd
from sdc.passes.fusion.fuse_tokens import FuseTokens
from sdc.passes.fusion.unflatten_group_norm import UnflattenGroupNorm
from sdc.passes.raising.raise_silu import RaiseSilu

SMALL_RESNET = [feed_resnet(), feed_resnet(scale=0.01)]
NORM = (RaiseSilu(), FuseGroupNormSilu())
CAUSAL = ATTENTION.replace("Attention (", "Attention <is_causal = 1> (")


def fuses(operator: str, wanted: Pass, kinds: dict[str, Broken], *, before: Sequence[Pass] = NORM) -> Case:
    """A case on the graph that `test_broken_rewrites` has for an operator."""
    make, feeds = GRAPHS[operator]
    return Case(make, feeds, (*before, wanted), kinds, type(wanted))


def attends(text: str, kinds: dict[str, Broken], feeds: Sequence[Feeds] = ATTENTION_FEEDS) -> Case:
    make: Callable[[], ir.Model] = lambda: make_attention(text)  # noqa: E731
    return Case(make, feeds, (FuseAttention(),), kinds)


def norm_kinds(operator: str, gamma: int) -> dict[str, Broken]:
    return {
        "epsilon left to another default": attribute(operator, "epsilon", 1e-5),
        "other groups": attribute(operator, "num_groups", 1),
        "gamma and beta swapped": swapped(operator, gamma, gamma + 1),
    }


def turn(model: ir.Model) -> None:
    """Height and width change places."""
    sites = [node for node in model.graph if domain.is_fused(node, domain.TOKENS_FROM_IMAGE)]
    BROKEN[domain.TOKENS_FROM_IMAGE]["wrong axes"](model, sites)


CASES = {
    "fuse-group-norm-silu": Case(
        make_resnet, SMALL_RESNET, NORM, norm_kinds(domain.GROUP_NORM_SILU, 1), FuseGroupNormSilu
    ),
    "fuse-add-group-norm-silu": fuses(
        domain.ADD_GROUP_NORM_SILU,
        FuseAddGroupNormSilu(),
        norm_kinds(domain.ADD_GROUP_NORM_SILU, 2) | {"addend forgotten": operand(domain.ADD_GROUP_NORM_SILU, 1, 0)},
    ),
    "fuse-concat-group-norm-silu": fuses(
        domain.CONCAT_GROUP_NORM_SILU,
        FuseConcatGroupNormSilu(),
        norm_kinds(domain.CONCAT_GROUP_NORM_SILU, 2) | {"other order": swapped(domain.CONCAT_GROUP_NORM_SILU, 0, 1)},
    ),
    "fuse-group-norm-silu-add": fuses(
        domain.GROUP_NORM_SILU_ADD,
        FuseGroupNormSiluAdd(),
        norm_kinds(domain.GROUP_NORM_SILU_ADD, 2) | {"sides swapped": swapped(domain.GROUP_NORM_SILU_ADD, 0, 1)},
    ),
    "fuse-add-group-norm": fuses(
        domain.ADD_GROUP_NORM,
        FuseAddGroupNorm(),
        norm_kinds(domain.ADD_GROUP_NORM, 2) | {"addend forgotten": operand(domain.ADD_GROUP_NORM, 1, 0)},
    ),
    "unflatten-group-norm": Case(
        lambda: make_model(FLAT, AFFINE),
        FLAT_FEEDS,
        (UnflattenGroupNorm(),),
        {
            "other groups": attribute("GroupNormalization", "num_groups", 9),
            "epsilon dropped": attribute("GroupNormalization", "epsilon", 0.0),
            "gamma and beta swapped": swapped("GroupNormalization", 1, 2),
        },
    ),
    "fuse-add-layer-norm": fuses(
        domain.BIAS_ADD_LAYER_NORM,
        FuseAddLayerNorm(),
        {
            "epsilon left to its default": attribute(domain.BIAS_ADD_LAYER_NORM, "epsilon", 1e-5),
            "bias and beta swapped": swapped(domain.BIAS_ADD_LAYER_NORM, 1, 4),
            "residual forgotten": operand(domain.BIAS_ADD_LAYER_NORM, 2, 0),
        },
        before=(),
    ),
    "fuse-attention": attends(
        ATTENTION.replace("Attention (", "Attention <scale = 0.7> ("),
        {
            "scale left to its default": attribute(domain.MULTI_HEAD_ATTENTION, "scale", 5**-0.5),
            "keys and values swapped": swapped(domain.MULTI_HEAD_ATTENTION, 1, 2),
            "heads and their size swapped": attribute(domain.MULTI_HEAD_ATTENTION, "num_heads", 5),
        },
    ),
    "fuse-attention, causal": attends(CAUSAL, {"causal lost": attribute(domain.MULTI_HEAD_ATTENTION, "is_causal", 0)}),
    "fuse-attention, mask": attends(
        masked("float"),
        {"mask of zeros": operand_values(domain.MULTI_HEAD_ATTENTION, 3, np.zeros_like)},
        ATTENTION_FEEDS[:1],
    ),
    "fuse-bias-geglu": fuses(
        domain.BIAS_GEGLU,
        FuseBiasGeGlu(),
        {
            "tanh": attribute(domain.BIAS_GEGLU, "approximate", "tanh"),
            "halves of the bias swapped": operand_values(domain.BIAS_GEGLU, 1, lambda bias: np.roll(bias, 7)),
        },
        before=(),
    ),
    "fuse-bias-add": fuses(
        domain.BIAS_ADD,
        FuseBiasAdd(),
        {
            "bias forgotten": operand_values(domain.BIAS_ADD, 1, np.zeros_like),
            "residual forgotten": operand(domain.BIAS_ADD, 2, 0),
        },
        before=(),
    ),
    "fuse-tokens": Case(
        *GRAPHS[domain.TOKENS_FROM_IMAGE],
        (FuseTokens(),),
        {"wrong axes": Broken(change=turn)},
    ),
}


@pytest.mark.parametrize(("name", "kind"), names(CASES))
def test_broken_pass_is_noticed(name: str, kind: str) -> None:
    check_noticed(CASES[name], kind)
