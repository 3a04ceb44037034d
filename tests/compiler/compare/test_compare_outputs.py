"""What two engines are fed, and differences that are not numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdc.compiler.compare.outputs import draw_feeds
from sdc.compiler.trace.run_graph import relative_difference
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("B", 4)),
        TensorSpec("states", "float32", ("B", 7)),
        TensorSpec("ids", "int64", (5,)),
    ),
    (TensorSpec("out", "float32", ("B", 4)),),
    {"B": DimensionRange(1, 2, 8)},
)


def test_an_input_gets_the_same_wherever_it_stands() -> None:
    one = draw_feeds(SPEC, seed=3)
    other = draw_feeds(replace(SPEC, inputs=SPEC.inputs[::-1]), seed=3)
    assert {name: value.tolist() for name, value in one.items()} == {
        name: value.tolist() for name, value in other.items()
    }
    assert one["sample"].ravel()[:3].tolist() != one["states"].ravel()[:3].tolist()
    assert one["sample"].tolist() != draw_feeds(SPEC, seed=4)["sample"].tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_infinitely_far(wrong: float) -> None:
    assert relative_difference(np.array([1.0, wrong]), np.array([1.0, 2.0])) == np.inf
