"""No pass is left out: each that changes what is computed is broken somewhere, and the others are named here."""

from __future__ import annotations

import test_broken_fusions
import test_broken_lowerings
import test_broken_precision
import test_broken_raises
import test_broken_simplifications

from sdc.passes.base import Pass
from sdc.passes.pipeline import (
    BACKENDS,
    ORT_CUDA,
    canonical_passes,
    fusion_passes,
    low_rank_passes,
    lowering_passes,
    precision_passes,
)

TABLES = (test_broken_fusions, test_broken_lowerings, test_broken_precision, test_broken_raises,
          test_broken_simplifications)  # fmt: skip

COMPUTE_NOTHING = {
    "infer-shapes": "states shapes, which the proof has ONNX compare with its own",
    "remove-unused": "removes what nothing reads: a graph that lacks more is invalid",
    "fix-names": "a graph with a name twice is invalid",
    "omit-outputs": "removes names of outputs that nothing reads: a graph that lacks more is invalid",
    "check-operators": "changes nothing",
}


def passes_of_all_phases() -> set[type[Pass]]:
    backends = (*BACKENDS, ORT_CUDA)
    typing = [each for backend in backends for each in precision_passes("fp16", backend=backend)]
    lowerings = [each for backend in backends for each in lowering_passes(backend)]
    before = (*canonical_passes(), *fusion_passes(), *low_rank_passes(), *typing)
    return {type(each) for each in (*before, *lowerings)}


def test_every_pass_is_broken_somewhere() -> None:
    broken = {type(case.passes[case.index]).name for table in TABLES for case in table.CASES.values()}
    names = {each.name for each in passes_of_all_phases()}
    assert names - broken == set(COMPUTE_NOTHING)
