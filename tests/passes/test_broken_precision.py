"""Quantisation and float16, broken in the ways in which they could have been, fail the proofs that they pass.

The proof of Q/DQ pairs is integer arithmetic in NumPy (`test_insert_qdq`): nothing quantised equals its source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from broken import Broken, Case, attribute, check_noticed, names, nodes, operand, patched, swapped, without_operand
from equality import make_model
from test_cast_fp16 import FP16, SINUSOID, SINUSOID_WEIGHTS
from test_insert_qdq import LAYERS, test_layers_compute_integers
from test_smoothing_sites import FEEDS, make_upsampler, smoothing_of
from test_upsample_by_phases import FEEDS as IMAGES
from test_upsample_by_phases import make as make_phases
from test_upsample_by_phases import quantised

from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.formats import Format
from sdc.passes.precision.scales import scale_from_range
from sdc.passes.precision.smooth_quant import SmoothQuant
from sdc.passes.precision.smoothing_sites import SmoothingSite, Writer
from sdc.passes.precision.upsample_by_phases import UpsampleByPhases

Quantise = Callable[..., tuple[np.ndarray, np.ndarray]]


def along_the_other_axis(quantise: Quantise) -> Quantise:
    """Weight scales are per input channel."""

    def exchanged(weights: np.ndarray, *, levels: int, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
        return quantise(weights, levels=levels, axis=None if axis is None else 1 - axis)

    return exchanged


def with_other_scales(factor: float) -> Callable[[Quantise], Quantise]:
    """Weight scales are not those of the integers."""

    def exchange(quantise: Quantise) -> Quantise:
        def exchanged(weights: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
            integers, scale = quantise(weights, **options)
            return integers, np.float32(factor) * scale

        return exchanged

    return exchange


def cut_off(_: Quantise) -> Quantise:
    """Weights are cut off towards zero and not rounded."""

    def exchanged(weights: np.ndarray, *, levels: int, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
        others = None if axis is None else tuple(i for i in range(weights.ndim) if i != axis)
        scale = scale_from_range(np.abs(weights).max(axis=others), levels)
        spread = scale if axis is None else np.expand_dims(scale, others or ())
        return np.trunc(weights / spread).astype(np.int8), scale

    return exchanged


INTEGERS: dict[str, Broken] = {
    "activations by too many levels": patched("precision.scales:HIGHEST", lambda _: 255),
    "activations by too few levels": patched("precision.scales:HIGHEST", lambda levels: levels - 1),
    "scales a little too large": patched("precision.weight_qdq:quantise_weights", with_other_scales(1.02)),
    "integers cut off": patched("precision.weight_qdq:quantise_weights", cut_off),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", INTEGERS)
def test_broken_integers_are_noticed(name: str, kind: str) -> None:
    test_layers_compute_integers(name, 8, True)
    with INTEGERS[kind].patch(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_layers_compute_integers(name, 8, True)


def test_scales_along_the_wrong_axis_are_noticed() -> None:
    name = "matmul-square"  # elsewhere the number of scales does not fit, and nothing can run it
    test_layers_compute_integers(name, 8, True)
    broken = patched("precision.weight_qdq:quantise_weights", along_the_other_axis)
    with broken.patch(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_layers_compute_integers(name, 8, True)


def without(forgotten: Callable[[Writer], bool]) -> Broken:
    """Some of the constants that write a tensor are not scaled."""

    def left(found: SmoothingSite) -> SmoothingSite:
        return replace(found, writers=tuple(each for each in found.writers if not forgotten(each)))

    def exchange(find_sites: Callable[..., Any]) -> Callable[..., Any]:
        def exchanged(layers: Any) -> Any:
            sites, skipped = find_sites(layers)
            return [left(each) for each in sites], skipped

        return exchanged

    return patched("precision.smooth_quant:find_sites", exchange)


def turn_padding(conv: ir.Node) -> None:
    """A phase looks to the other side."""
    top, left, bottom, right = conv.attributes.get_ints("pads", [])
    conv.attributes["pads"] = ir.AttrInt64s("pads", [bottom, right, top, left])


def of_phase(other: Callable[[int, int], tuple[int, int]]) -> Broken:
    """Phases have the kernels of others."""

    def exchange(kernel: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda weight, row, column: kernel(weight, *other(row, column))

    return patched("precision.upsample_by_phases:phase_kernel", exchange)


def by_tap(other: Callable[[int, int], int]) -> Broken:
    """Taps fall on other ones."""
    return patched("precision.upsample_by_phases:_tap", lambda _: other)


def fewer_levels(constant: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The integers before are taken for smaller ones."""
    return lambda value: constant(value) // 32


PHASE_KINDS = {
    "taps of the other parity": by_tap(lambda tap, parity: (tap - parity) // 2 + parity),
    "outer taps apart": by_tap(lambda tap, _: min(tap, 1)),
    "kernels of one phase": of_phase(lambda *_: (0, 0)),
    "rows for columns": of_phase(lambda row, column: (column, row)),
    "padded at the other side": nodes("Conv", turn_padding),
    "channels in blocks of the other order": attribute("DepthToSpace", "mode", "CRD"),
    "phases in another order": swapped("Concat", 1, 2),
    "a phase forgotten": operand("Concat", 3, 0),
}

CASES = {
    "upsample-by-phases": Case(
        make_phases, IMAGES, (UpsampleByPhases(),), PHASE_KINDS | {"bias forgotten": without_operand("Conv", 2)}
    ),
    "upsample-by-phases, quantised": Case(
        lambda: quantised(Format.INT8)[0],
        IMAGES,
        (UpsampleByPhases(),),
        PHASE_KINDS
        | {
            "scales of other integers": patched(
                "precision.upsample_by_phases:quantise_weights", with_other_scales(1.5)
            ),
            "fewer levels": patched("precision.upsample_by_phases:constant", fewer_levels),
        },
        tolerance=0.02,  # kernels are rounded anew: some steps of them
    ),
    "smooth-quant": Case(
        make_upsampler,
        [FEEDS],
        (SmoothQuant(smoothing_of(make_upsampler())),),
        {
            "a bias forgotten": without(lambda writer: writer.index == 2),
            "a summand forgotten": without(lambda writer: len(writer.node.inputs) == 2),
            "the reader forgotten": patched(
                "precision.smooth_quant:scaled_initializer",
                lambda scale: lambda graph, value, factors, axis: scale(graph, value, factors ** (1 - axis), axis),
            ),
        },
    ),
    "cast-fp16": Case(
        lambda: make_model(SINUSOID, SINUSOID_WEIGHTS),
        [{"timestep": np.array([987.3], np.float32)}],
        (CastFp16(),),
        {"sinusoid in half": patched("precision.cast_half:_island_nodes", lambda _: lambda *_: set())},
        tolerance=FP16,
    ),
}


@pytest.mark.parametrize(("name", "kind"), names(CASES))
def test_broken_pass_is_noticed(name: str, kind: str) -> None:
    check_noticed(CASES[name], kind)
