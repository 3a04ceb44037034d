from __future__ import annotations

import pytest
from equality import apply_proven, operators
from transformer_graph import FEEDS, TRANSFORMER, make_transformer

from sdc.passes.fusion.fuse_bias_add import FuseBiasAdd
from sdc.passes.lowering.lower_bias_sums import LowerBiasSums

SUM = "sum3 = Add (sum1, biased3)"


@pytest.mark.parametrize("new", [SUM, "sum3 = Add (biased3, sum1)"])
def test_bias_and_residual_become_one_node(new: str) -> None:
    model = make_transformer(TRANSFORMER.replace(SUM, new))
    (report,) = apply_proven(FuseBiasAdd(), model, FEEDS)
    assert (report.matched, report.skipped) == (2, ())
    fused = [node for node in model.graph if node.domain == "sdc"]
    assert [value.name for value in (*fused[1].inputs, *fused[1].outputs)] == ["product3", "b3", "sum1", "sum3"]


def test_residual_of_another_shape_says_why() -> None:
    model = make_transformer(TRANSFORMER.replace(SUM, "sum3 = Add (b1, biased3)"))
    report = FuseBiasAdd().run(model)
    assert report.matched == 1
    assert ["expected the sum's" in each.reason for each in report.skipped] == [True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("biased3 = Add (product3, b3)", "p = Neg (product3)  biased3 = Add (p, b3)"),
        ("biased3 = Add (product3, b3)", "b = Neg (b3)  biased3 = Add (product3, b)"),
        (SUM, "s3 = Add (sum1, biased3)  sum3 = Mul (s3, biased3)"),
    ],
    ids=["no MatMul", "computed bias", "biased product is read elsewhere"],
)
def test_site_without_a_bias_of_its_own_is_no_candidate(old: str, new: str) -> None:
    model = make_transformer(TRANSFORMER.replace(old, new))
    (report,) = apply_proven(FuseBiasAdd(), model, FEEDS)
    assert (report.matched, report.skipped) == (1, ())


def test_lowered_to_one_sum() -> None:
    model = make_transformer()
    FuseBiasAdd().run(model)
    assert apply_proven(LowerBiasSums(), model, FEEDS)[0].matched == 2
    assert operators(model).count("Sum") == 2
