"""Attention's masks: those that stay, those that are causal, and those that no Attention can hold."""

from __future__ import annotations

import numpy as np
import pytest
from attention_graph import (
    BLIND,
    CAUSAL,
    FEEDS,
    PASSES,
    SCORES,
    VISIBLE,
    attention,
    masked,
    raised,
    replaced,
)
from equality import apply_proven, operators
from small_graphs import normal


@pytest.mark.parametrize(
    ("scores", "mask"),
    [
        ("scores = Add (scaled, mask)", normal(9, 11, 7)),
        ("scores = Add (mask, scaled)", normal(9, 1, 1, 11, 7)),
        ("scores = Add (scaled, mask)", normal(9, 3, 11, 7)),
        ("scores = Where (mask, scaled, hidden)", VISIBLE),
        ("scores = Where (mask, hidden, scaled)", ~VISIBLE),
        ("scores = Where (mask, scaled, hidden)", BLIND),
    ],
)
def test_masks_stay(scores: str, mask: np.ndarray) -> None:
    model = attention(masked(scores), masks={"mask": mask})
    (report, *_) = apply_proven(PASSES, model, FEEDS)
    assert report.matched == 1
    assert len(raised(model).inputs) == 4


def test_mask_of_one_row_is_not_causal() -> None:
    first_key_only = np.where(np.arange(7) > 0, -1e9, 0).astype(np.float32)[None]
    model = attention(masked("scores = Add (scaled, mask)"), masks={"mask": first_key_only})
    (report, *_) = apply_proven(PASSES, model, FEEDS)
    assert report.matched == 0
    assert "one row for all queries" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("scores", "mask"),
    [("scores = Add (scaled, mask)", normal(9, 11, 1)), ("scores = Where (mask, scaled, hidden)", VISIBLE[:, :1])],
)
def test_mask_of_one_column_stays(scores: str, mask: np.ndarray) -> None:
    model = attention(masked(scores), masks={"mask": mask})
    (report, *_) = apply_proven(PASSES, model, FEEDS)
    assert report.matched == 0
    assert "one column for all keys" in report.skipped[0].reason


def test_hidden_score_that_is_not_low_stays() -> None:
    model = attention(masked("scores = Where (mask, scaled, low)"), masks={"mask": BLIND})
    (report, *_) = apply_proven(PASSES, model, FEEDS)
    assert report.matched == 0
    assert "too near" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("scores", "mask"),
    [
        ("scores = Add (scaled, mask)", np.where(CAUSAL, 0, -1e4).astype(np.float32)),
        ("scores = Add (scaled, mask)", np.where(CAUSAL, 0, -np.inf).astype(np.float32)[None, None]),
        ("scores = Where (mask, scaled, hidden)", CAUSAL),
        ("scores = Where (mask, hidden, scaled)", ~CAUSAL),
    ],
)
def test_causal_masks_go(scores: str, mask: np.ndarray) -> None:
    model = attention(masked(scores), masks={"mask": mask})
    (report, *_) = apply_proven(PASSES, model, FEEDS)
    assert report.details == {"causal": 1}
    assert len(raised(model).inputs) == 3
    assert raised(model).attributes["is_causal"].as_int() == 1


@pytest.mark.parametrize("mask", [CAUSAL, np.where(CAUSAL, 0, -1e4).astype(np.float32)])
def test_causal_mask_of_an_attention_goes(mask: np.ndarray) -> None:
    body = replaced(
        (SCORES, ""),
        ("probabilities = Softmax <axis = -1> (scores)", ""),
        ("MatMul (probabilities, v)", "Attention (q, kn, v, mask)"),
        ("k = Transpose <perm = [0, 2, 3, 1]>", "kn = Transpose <perm = [0, 2, 1, 3]>"),
    )
    model = attention(body, masks={"mask": mask})
    apply_proven(PASSES, model, FEEDS)
    assert len(raised(model).inputs) == 3
    other = attention(body, masks={"mask": ~mask if mask.dtype == bool else mask / 2e4})
    apply_proven(PASSES, other, FEEDS[:1] if mask.dtype != bool else [])
    assert len(raised(other).inputs) == 4


def test_guard_against_rows_without_keys_goes() -> None:
    model = attention(
        replaced(
            ("MatMul (probabilities, v)", "MatMul (safe, v)"),
            ("attended =", "empty = IsNaN (probabilities)\n safe = Where (empty, zero, probabilities)\n attended ="),
        )
    )
    apply_proven(PASSES, model, FEEDS)
    assert operators(model).count("IsNaN") == 0
