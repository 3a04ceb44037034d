"""Activations as OpenVINO's session has them: by hand, and that graphs and engines name the same sums."""

from __future__ import annotations

import sys
from pathlib import Path

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.memory.openvino_activations import as_openvino_holds
from sdc.engines.sessions import EngineSource
from sdc.engines.sessions.openvino import read_engine
from sdc.engines.sessions.openvino_group_norm import sums_taken
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.memory.buffers import ALIGNMENT, SizedGraph, Step
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.memory.plan import plan_memory
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from exported_graphs import load_graph

TARGET = TARGETS["cpu"]
LARGE = {"B": 1, "H": 48, "W": 48}
SPEC = ComponentSpec(
    "vae_decoder",
    (TensorSpec("latent_sample", "float32", ("B", 4, "H", "W")),),
    (TensorSpec("sample", "float32", ("B", 3, "4*H", "4*W")),),
    {"B": DimensionRange(1, 1, 4), "H": DimensionRange(4, 48, 48), "W": DimensionRange(4, 48, 48)},
)
RESIDUAL = SizedGraph(
    ("images", "branch", "sum", "mean free", "half", "whole"),
    (ALIGNMENT,) * 6,
    (
        Step("Conv", (), (0,)),
        Step("Conv", (0,), (1,)),
        Step("Add", (0, 1), (2,), (0, 1)),
        Step("Conv", (2,), (4,)),
        Step("InstanceNormalization", (2,), (3,)),
        Step("Cast", (3,), (5,)),
    ),
    frozenset({4, 5}),
)


def shared_units(graph: SizedGraph) -> int:
    return plan_memory(graph, in_place=True).written.arena.bytes // ALIGNMENT


def test_a_sum_that_the_norms_kernel_computes_is_beside_its_operands() -> None:
    held = as_openvino_holds(RESIDUAL, {"sum"})
    assert [(step.operator, step.reads, step.writes) for step in held.steps[2:]] == [
        ("InstanceNormalization", (0, 1), (2, 3)),
        ("Conv", (2,), (4,)),
    ]
    assert shared_units(held) == 4
    other = as_openvino_holds(RESIDUAL, {"branch", "mean free"})
    assert [step.operator for step in other.steps] == ["Conv", "Conv", "Add", "Conv", "InstanceNormalization"]
    assert shared_units(other) == 2


def test_a_sum_that_no_norm_reads_stays_one() -> None:
    steps = tuple(step for step in RESIDUAL.steps if step.operator not in ("InstanceNormalization", "Cast"))
    graph = SizedGraph(RESIDUAL.names, RESIDUAL.bytes, steps, frozenset({4}))
    assert as_openvino_holds(graph, {"sum"}).steps == steps


def test_outputs_are_held_by_nobody() -> None:
    held = as_openvino_holds(RESIDUAL)
    assert held.outputs == frozenset()
    assert "Cast" not in [step.operator for step in held.steps]
    read_again = (*RESIDUAL.steps, Step("Conv", (5,), (1,)))
    held = as_openvino_holds(SizedGraph(RESIDUAL.names, RESIDUAL.bytes, read_again, frozenset({4, 5})))
    assert held.steps == read_again
    inner = SizedGraph(RESIDUAL.names, RESIDUAL.bytes, RESIDUAL.steps, frozenset({4}))
    assert as_openvino_holds(inner).steps == RESIDUAL.steps


def test_sums_of_an_engine_are_buffers_of_its_graph(tmp_path: Path) -> None:
    """A decoder's last sum is normalised at the pictures' full size, where it needs most."""
    component = Component(SPEC, load_graph("vae_decoder"))
    passes = (*canonical_passes(), *fusion_passes("vae_decoder"), *precision_passes("bf16", backend=TARGET.backend))
    run_passes((*passes, *lowering_passes(TARGET.backend)), component.model)
    built = build_engine(component, TARGET, tmp_path)
    files = tuple(tmp_path / file for file in built.files)
    model = read_engine(EngineSource(SPEC, TARGET.backend, files, {"inference_precision": "auto"}))
    sums = sums_taken(model, {"latent_sample": (1, 4, LARGE["H"], LARGE["W"])})
    graph = buffers_from_graph(component.model).at(LARGE, floating_bits=16)
    held = as_openvino_holds(graph, sums)
    adds = sum(step.operator == "Add" for step in graph.steps)
    joined = adds - sum(step.operator == "Add" for step in held.steps)
    assert sums <= set(graph.names)
    assert 0 < joined == len(sums) < adds
    assert not sums_taken(model, {"latent_sample": (1, 4, 4, 4)})
