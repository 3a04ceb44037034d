"""factorise-weights: equal results with fewer multiply-adds, on every kind of layer, and the weights that it leaves.

With an energy: ranks and results against NumPy's own decomposition.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from equality import FP32, apply_proven, make_model, operators, relative_error, run_model
from small_graphs import normal

from sdc.engines.errors import InputError
from sdc.passes.macs import count_macs
from sdc.passes.pipeline import low_rank_passes
from sdc.passes.simplify.factorise_weights import FactoriseWeights, low_rank_factors
from sdc.passes.simplify.remove_unused import RemoveUnused

GRAPH = """<ir_version: 10, opset_import: ["": 23]> g (float[B, 14, H, W] x, float[B, 7, 20] t, float[9, 12] l)
    => (float[B, 18, I, J] a, float[B, 7, 13] b, float[9, 16] c, float[9, 11] d) {
    a = Conv <strides = [2, 1], pads = [1, 0, 1, 2], dilations = [1, 2]> (x, kernel, kernel_bias)
    b = MatMul (t, matrix)
    c = Gemm <transB = 1, alpha = 1.5, beta = 0.5> (l, turned, turned_bias)
    d = Gemm (l, plain)
}"""
FEEDS = [{"x": normal(1, batch, 14, 9, 11), "t": normal(2, batch, 7, 20), "l": normal(3, 9, 12)} for batch in (1, 3)]
RANKS = {"kernel": 4, "matrix": 5, "turned": 3, "plain": 2}
TOLERANCE = 5e-5
"""The pass's own, 1e-5, is of the weights' norm; a result may be smaller than the largest that a weight makes."""


def low_rank(seed: int, rank: int, *shape: int) -> np.ndarray:
    """A weight of a rank, rounded to float32: its first axis against the others."""
    inner = int(np.prod(shape[1:]))
    return (normal(seed, shape[0], rank) @ normal(seed + 1, rank, inner)).reshape(shape)


def weights() -> dict[str, np.ndarray]:
    return {
        "kernel": low_rank(4, RANKS["kernel"], 18, 14, 3, 3),
        "kernel_bias": normal(5, 18),
        "matrix": low_rank(6, RANKS["matrix"], 20, 13),
        "turned": low_rank(8, RANKS["turned"], 16, 12),
        "turned_bias": normal(9, 16),
        "plain": low_rank(10, RANKS["plain"], 12, 11),
    }


def make() -> ir.Model:
    return make_model(GRAPH, weights())


def test_every_kind_of_layer_becomes_two_that_are_equal() -> None:
    model = make()
    report = apply_proven([FactoriseWeights(), RemoveUnused()], model, FEEDS, tolerance=TOLERANCE)[0]
    assert report.matched == 4
    assert operators(model) == ["Conv", "Conv", "MatMul", "MatMul", "Gemm", "Gemm", "Gemm", "Gemm"]
    assert report.details is not None
    layers = list(report.details["layers"].values())
    assert [layer["rank"] for layer in layers] == list(RANKS.values())
    assert all(layer.pop("energy_lost") < 1e-12 for layer in layers)
    assert layers[0] == {
        "rank": 4,
        "full_rank": 18,
        "weights_before": 18 * 14 * 9,
        "weights_after": 4 * (18 + 14 * 9),
    }
    stored = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    assert stored == sum(layer["weights_after"] for layer in layers) + 18 + 16
    inner = model.graph[0].outputs[0]
    assert str(inner.shape) == str(model.graph[1].outputs[0].shape).replace("18", "4")


def test_multiply_adds_are_what_the_report_says() -> None:
    model, sizes = make(), {"B": 2, "H": 9, "W": 11}
    before = {each.site: each.macs for each in count_macs(model, sizes).products}
    FactoriseWeights().run(model)
    after = {each.site: each.macs for each in count_macs(model, sizes).products}
    assert after["b"] + after["b.factor"] == 2 * 7 * 5 * (20 + 13) < before["b"]
    assert after["a"] + after["a.factor"] == before["a"] * 4 * (18 + 126) // (18 * 126)


def test_a_weight_of_full_rank_is_left_without_a_word() -> None:
    full = {**weights(), "matrix": normal(6, 20, 13), "turned": normal(7, 16, 12)}
    report = apply_proven(FactoriseWeights(), make_model(GRAPH, full), FEEDS, tolerance=TOLERANCE)[0]
    assert report.matched == 2
    assert report.skipped == ()


def test_a_rank_that_saves_nothing_is_named() -> None:
    """8 (20 + 13) = 264 weights in place of 260."""
    model = make_model(GRAPH, {**weights(), "matrix": low_rank(6, 8, 20, 13)})
    report = FactoriseWeights().run(model)
    assert [skip.reason for skip in report.skipped] == ["rank 8 of 13 takes no fewer multiply-adds"]
    assert report.matched == 3


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        (
            "float[4, 9, 8] x) => (float[4, 9, 12] y) { y = MatMul (x, w) }",
            np.stack([low_rank(1, 1, 8, 12)] * 4),
            "its weight has 3 axes, no matrix's two",
        ),
        (
            "float[8, 9] x) => (float[9, 12] y) { y = Gemm <transA = 1> (x, w) }",
            low_rank(1, 1, 8, 12),
            "its activation is transposed",
        ),
        (
            "float[1, 16, 9] x) => (float[1, 12, 9] y) { y = Conv <group = 2> (x, w) }",
            low_rank(1, 1, 12, 8, 1),
            "it has 2 groups",
        ),
        (
            "float16[9, 8] x) => (float16[9, 12] y) { y = MatMul (x, w) }",
            low_rank(1, 1, 8, 12).astype(np.float16),
            "its weight is float16, not float32",
        ),
    ],
)
def test_what_cannot_be_split_is_left_with_the_reason(text: str, weight: np.ndarray, reason: str) -> None:
    model = make_model(f'<ir_version: 10, opset_import: ["": 23]> g ({text}', {"w": weight})
    report = FactoriseWeights().run(model)
    assert report.matched == 0
    assert [skip.reason for skip in report.skipped] == [reason]


def test_a_weight_that_is_computed_is_left() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[9, 8] x, float[8, 12] w) => (float[9, 12] y)
        { y = MatMul (x, w) }"""
    assert FactoriseWeights().run(make_model(text, {})).matched == 0


@pytest.mark.parametrize("shape", [(17, 40), (40, 17)])
def test_the_rank_is_the_least_within_the_tolerance(shape: tuple[int, int]) -> None:
    """Singular values against NumPy's own."""
    random = np.random.default_rng(3)
    bases = [np.linalg.qr(random.standard_normal((size, 17)))[0] for size in shape]
    values = np.geomspace(1, 1e-4, 17)
    matrix = ((bases[0] * values) @ bases[1].T).astype(np.float32)
    for tolerance in (0.3, 1e-2, 5e-4):
        left, right = low_rank_factors(matrix, tolerance) or pytest.fail("of full rank")
        rest = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
        assert left.shape[1] == right.shape[0] == np.count_nonzero(rest > tolerance * rest[0])
        assert np.linalg.norm(left @ right - matrix) <= 1.001 * tolerance * np.linalg.norm(matrix)
    assert low_rank_factors(matrix, 1e-5) is None
    zeros = low_rank_factors(np.zeros(shape, np.float32), 1e-5)
    assert zeros is not None
    assert zeros[0].shape[1] == 1
    assert not (zeros[0] @ zeros[1]).any()


ENERGY = 0.9
SPECTRUM = 0.7
"""Each singular value in the weights below is this share of the one before."""


def with_spectrum(seed: int, *shape: int) -> np.ndarray:
    """A weight of full rank whose singular values fall by `SPECTRUM`; its first axis against the others."""
    sizes = (shape[0], int(np.prod(shape[1:])))
    bases = [np.linalg.qr(normal(seed + place, size, min(sizes)))[0] for place, size in enumerate(sizes)]
    return ((bases[0] * SPECTRUM ** np.arange(min(sizes))) @ bases[1].T).reshape(shape).astype(np.float32)


def spectral_weights() -> dict[str, np.ndarray]:
    """As `weights`, of full rank; the last one's spectrum is flat."""
    made = {
        name: with_spectrum(30 + len(name), *each.shape) if each.ndim > 1 else each for name, each in weights().items()
    }
    return {**made, "plain": np.linalg.qr(normal(10, 12, 11))[0].astype(np.float32)}


def truncated(weight: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(weight.reshape(len(weight), -1).astype(np.float64), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(weight.shape).astype(np.float32)


def least_rank(weight: np.ndarray, energy: float) -> int:
    squares = np.linalg.svd(weight.reshape(len(weight), -1).astype(np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squares) >= energy * squares.sum())) + 1


def test_with_an_energy_ranks_are_the_least_that_keep_it() -> None:
    """Results are those of NumPy's truncated weights, far from those of the whole ones, at fewer multiply-adds."""
    whole, sizes = spectral_weights(), {"B": 2, "H": 9, "W": 11}
    model = make_model(GRAPH, whole)
    before = count_macs(model, sizes).weighted
    report = FactoriseWeights(energy=ENERGY).run(model)
    assert report.details is not None
    layers = dict(zip(("kernel", "matrix", "turned"), report.details["layers"].values(), strict=True))
    for name, layer in layers.items():
        rank, squares = layer["rank"], SPECTRUM ** (2 * np.arange(layer["full_rank"]))
        assert 1 < rank == least_rank(whole[name], ENERGY)
        assert layer["energy_lost"] == pytest.approx(squares[rank:].sum() / squares.sum(), rel=0.01)
        assert layer["energy_lost"] <= 1 - ENERGY < squares[rank - 1 :].sum() / squares.sum()
    assert [skip.reason for skip in report.skipped] == ["rank 10 of 11 takes no fewer multiply-adds"]
    expected = whole | {name: truncated(whole[name], layer["rank"]) for name, layer in layers.items()}
    assert count_macs(model, sizes).weighted < 0.7 * before
    for feeds in FEEDS:
        assert relative_error(model, run_model(make_model(GRAPH, expected), feeds), feeds) < FP32
        assert relative_error(model, run_model(make_model(GRAPH, whole), feeds), feeds) > 0.05


def test_with_an_energy_a_weight_that_needs_its_full_rank_is_named() -> None:
    report = FactoriseWeights(energy=0.99).run(make_model(GRAPH, spectral_weights()))
    assert "rank 11 of 11 takes no fewer multiply-adds" in [skip.reason for skip in report.skipped]


@pytest.mark.parametrize("energy", [0.0, 1.0, -0.5, 1.5, float("nan"), 1 - 1e-14])
def test_energies_that_make_no_sense(energy: float) -> None:
    with pytest.raises(InputError, match="the energy that weights keep must be between 0 and 1, found"):
        low_rank_passes(energy)
