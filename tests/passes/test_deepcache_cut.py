"""A UNet in two at a skip connection: the shallow graph gives what the whole gives, from deep features of any step."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from equality import FP32, make_model, operators, run_model
from exported_graphs import DYNAMO, feed, load_graph
from small_graphs import normal
from test_hoist import typed_unet

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import run_passes
from sdc.passes.hoisting.deepcache import Cached, find_skip_connections, split_deep
from sdc.passes.hoisting.hoist import hoist
from sdc.passes.pipeline import BACKENDS, canonical_passes, fusion_passes, lowering_passes
from sdc.passes.shapes.resolve_shapes import ResolveShapes

UNET = """
<ir_version: 10, opset_import: ["": 23]>
unet (float[B, 3, H, W] sample, float[1] timestep, float[B, 5, 7] states) => (float[B, 3, H, W] out_sample)
<int64[1] last = {2}, int64[1] planes = {3}, float[4] scales = {1, 1, 2, 2}>
{
    first = Conv <pads = [1, 1, 1, 1]> (sample, w_first)
    warm = Mul (first, timestep)
    second = Tanh (warm)
    down = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (second, w_down)
    text = ReduceMean (states, last)
    bias = Unsqueeze (text, planes)
    told = Add (down, bias)
    middle = Sin (told)
    low = Concat <axis = 1> (middle, down)
    mixed = Conv (low, w_mixed)
    large = Resize <mode = "nearest"> (mixed, , scales)
    joined = Concat <axis = 1> (large, second)
    shifted = Add (joined, timestep)
    up = Conv <pads = [1, 1, 1, 1]> (shifted, w_up)
    last_join = Concat <axis = -3> (first, up)
    out_sample = Conv (last_join, w_out)
}
"""
"""The parts of a UNet that matter here, with odd channels: three skip connections, the last with its operands swapped.
The prompt is read by the deepest layer alone, the timestep by all but the last."""

DEEP = ("up", "large", "middle")
"""By depth, what is cached."""

CHANNELS = (2, 4, 5)
WEIGHTS = {
    "w_first": normal(1, 4, 3, 3, 3) / 3,
    "w_down": normal(2, 5, 4, 3, 3) / 3,
    "w_mixed": normal(3, 4, 10, 1, 1) / 3,
    "w_up": normal(4, 2, 8, 3, 3) / 3,
    "w_out": normal(5, 3, 6, 1, 1) / 3,
}
SIZES = [{}, {"batch": 1, "height": 4, "width": 10}]


def make_unet(*replacements: tuple[str, str]) -> ir.Model:
    """`UNET`, or a variation of it."""
    text = UNET
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return make_model(text, _weights_in(text))


def _weights_in(text: str) -> dict[str, np.ndarray]:
    return {name: each for name, each in WEIGHTS.items() if re.search(rf"\b{name}\b", text)}


def make_shallow(depth: int) -> ir.Model:
    """By hand: what computes the deep features is taken out of the text, which makes them an input."""
    name, sizes = DEEP[depth], ("H2, W2" if depth == 2 else "H, W")
    text = re.sub(rf"    {name} = .*\n", "", UNET)
    text = text.replace("states)", f"states, float[B, {CHANNELS[depth]}, {sizes}] {name})")
    return make_model(text, _weights_in(text))


def feed_unet(*, batch: int = 3, height: int = 6, width: int = 8, seed: int = 10) -> dict[str, np.ndarray]:
    return {
        "sample": normal(seed, batch, 3, height, width),
        "timestep": np.array([0.1 * seed], np.float32),
        "states": normal(seed + 1, batch, 5, 7),
    }


def wanted_of(model: ir.Model, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {value.name or "": values[value.name or ""] for value in model.graph.inputs}


def split_proven(model: ir.Model, feeds: list[dict[str, np.ndarray]], depth: int, tolerance: float = FP32) -> Cached:
    """Split; fail unless both graphs are valid and give what the one gave, with deep features of the same step."""
    expected = [run_model(model, each)["out_sample"] for each in feeds]
    cached = split_deep(model, depth)
    for graph in (model, cached.shallow):
        onnx.checker.check_model(ir.to_proto(graph))
    assert cached.full.dtype == cached.taken.dtype == ir.DataType.FLOAT
    for each, wanted in zip(feeds, expected, strict=True):
        assert wanted.std() > 0
        full = run_model(model, each)
        assert list(full) == ["out_sample", "deep.0"]
        shallow = run_model(cached.shallow, wanted_of(cached.shallow, {**each, **full}))
        assert list(shallow) == ["out_sample"]
        for found in (full, shallow):
            error = np.abs(found["out_sample"] - wanted).max() / np.abs(wanted).max()
            assert error <= tolerance, f"not equal: the relative error is {error:.1e}"
    return cached


def split_and_reuse(model: ir.Model, depth: int) -> Cached:
    """Split `UNET`; fail unless the shallow graph with deep features of another step gives what it gives by hand."""
    cached = split_proven(model, [feed_unet(**size) for size in SIZES], depth)
    before, now = feed_unet(seed=20), feed_unet(seed=30)
    deep = run_model(model, before)["deep.0"]
    found = run_model(cached.shallow, wanted_of(cached.shallow, {**now, "deep.0": deep}))["out_sample"]
    by_hand = make_shallow(depth)
    wanted = run_model(by_hand, wanted_of(by_hand, {**now, DEEP[depth]: deep}))["out_sample"]
    assert np.abs(found - run_model(model, now)["out_sample"]).max() > 0.01, "the step must matter"
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= FP32, f"not equal: the relative error is {error:.1e}"
    return cached


@pytest.mark.parametrize(
    ("depth", "inputs", "left"),
    [
        (0, ["sample", "deep.0"], ["Conv", "Concat", "Conv"]),
        (1, ["sample", "timestep", "deep.0"], ["Conv", "Mul", "Tanh", "Concat", "Add", "Conv", "Concat", "Conv"]),
        (
            2,
            ["sample", "timestep", "deep.0"],
            [
                *("Conv", "Mul", "Tanh", "Conv", "Concat", "Conv", "Resize"),
                *("Concat", "Add", "Conv", "Concat", "Conv"),
            ],
        ),
    ],
)
def test_shallow_graph_holds_what_is_behind_the_skip_connection(depth: int, inputs: list[str], left: list[str]) -> None:
    model = make_unet()
    whole = operators(model)
    cached = split_and_reuse(model, depth)
    assert operators(model) == whole
    assert [value.name for value in model.graph.inputs] == ["sample", "timestep", "states"]
    assert [value.name for value in cached.shallow.graph.inputs] == inputs
    assert operators(cached.shallow) == left
    report = cached.report
    assert (report.matched, report.nodes_before, report.nodes_after) == (
        len(whole) - len(left),
        len(whole),
        len(left),
    )


def test_connections_are_found_in_the_order_of_the_graph() -> None:
    found = find_skip_connections(make_unet().graph)
    assert [(each.deep.name, each.skip.name) for each in found] == [
        ("middle", "down"),
        ("large", "second"),
        ("up", "first"),
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "last_join = Concat <axis = -3> (first, up)",
            "half = Cast <to = 10> (first)\n    skip = Cast <to = 1> (half)\n"
            "    last_join = Concat <axis = 1> (up, skip)",
        ),
        (
            "last_join = Concat <axis = -3> (first, up)",
            "bytes = QuantizeLinear (first, step, zero)\n    skip = DequantizeLinear (bytes, step, zero)\n"
            "    last_join = Concat <axis = 1> (up, skip)",
        ),
    ],
)
def test_a_skip_may_change_its_type_on_the_way(old: str, new: str) -> None:
    model = make_unet((old, new), ("int64[1] last", "float step = {0.05}, int8 zero = {3}, int64[1] last"))
    cached = split_proven(model, [feed_unet()], 0)
    assert [value.name for value in cached.shallow.graph.inputs] == ["sample", "deep.0"]


def test_deep_features_in_float16_are_cast_on_both_sides() -> None:
    model = make_unet(
        ("up = Conv <pads = [1, 1, 1, 1]> (shifted, w_up)", "wide = Conv <pads = [1, 1, 1, 1]> (shifted, w_up)\n"
         "    up = Cast <to = 10> (wide)\n    half = Cast <to = 10> (first)"),
        ("last_join = Concat <axis = -3> (first, up)", "halves = Concat <axis = -3> (half, up)\n"
         "    last_join = Cast <to = 1> (halves)"),
    )  # fmt: skip
    split_proven(model, [feed_unet()], 0, tolerance=0)


def test_a_name_that_is_taken_is_left_out() -> None:
    model = make_unet()
    next(node for node in model.graph if node.op_type == "Sin").outputs[0].name = "deep.0"
    cached = split_deep(model)
    assert (cached.full.name, cached.taken.name) == ("deep.1", "deep.1")


def test_an_extra_reader_of_the_deep_features_reads_the_cached_ones() -> None:
    model = make_unet(
        ("out_sample = Conv (last_join, w_out)", "plain = Conv (last_join, w_out)\n    most = ReduceMax (up)\n"
         "    out_sample = Add (plain, most)"),
    )  # fmt: skip
    cached = split_proven(model, [feed_unet()], 0)
    assert [value.name for value in cached.shallow.graph.inputs] == ["sample", "deep.0"]


@pytest.mark.parametrize(
    "replacements",
    [
        # Of three tensors; along another axis; of two of which neither is computed from the other; of one with itself.
        [("Concat <axis = -3> (first, up)", "Concat <axis = 1> (first, up, sample)"), ("w_out", "w_other")],
        [("Concat <axis = -3> (first, up)", "Concat <axis = 2> (sample, changed)"), ("w_out", "w_short")],
        [("Concat <axis = -3> (first, up)", "Concat <axis = 1> (second, other)"), ("w_out", "w_wide")],
        [("Concat <axis = -3> (first, up)", "Concat <axis = 1> (sample, sample)")],
        # What only takes the size of the other.
        [("Concat <axis = -3> (first, up)", "Concat <axis = 1> (sample, grid)")],
    ],
)
def test_other_joins_are_no_skip_connections(replacements: list[tuple[str, str]]) -> None:
    text = UNET.replace("(middle, down)", "(middle, middle)").replace("(large, second)", "(large, large)")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    text = text.replace(
        "    last_join",
        "    changed = Sin (sample)\n    size = Shape (sample)\n"
        "    grid = Expand (half, size)\n    other = Conv (sample, w_mix)\n    last_join",
    )
    text = text.replace("int64[1] last", "float half = {0.5}, int64[1] last")
    weights = WEIGHTS | {"w_other": normal(6, 3, 9, 1, 1), "w_short": normal(7, 3, 3, 1, 1)}
    weights |= {"w_wide": normal(8, 3, 8, 1, 1), "w_mix": normal(9, 4, 3, 1, 1)}
    model = make_model(text, {name: each for name, each in weights.items() if re.search(rf"\b{name}\b", text)})
    assert find_skip_connections(model.graph) == []
    with pytest.raises(PassError, match=r"DeepCache needs a skip connection: .* This graph has none; export without"):
        split_deep(model)


SIZE_READ = (
    "out_sample = Conv (last_join, w_out)",
    "plain = Conv (last_join, w_out)\n    rows = Shape <start = 2, end = 3> (second)\n    tall = Cast <to = 1> (rows)\n"
    "    out_sample = Add (plain, tall)",
)


def test_a_size_of_a_deep_tensor_is_read_of_another_one() -> None:
    model = make_unet(SIZE_READ)
    ResolveShapes().run(model)
    cached = split_proven(model, [feed_unet(**size) for size in SIZES], 0)
    assert operators(cached.shallow) == ["Conv", "Concat", "Conv", "Shape", "Cast", "Add"]


def test_a_size_that_only_deep_tensors_have_is_refused() -> None:
    model = make_unet((SIZE_READ[0], SIZE_READ[1].replace("(second)", "(middle)")))
    with pytest.raises(PassError, match=r"reads sizes of tensors that only the deep layers compute, .* another depth"):
        split_deep(model)


@pytest.mark.parametrize("depth", [3, 12, -1])
def test_a_depth_that_is_not_there_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match=f"DeepCache at depth {depth}: .* 3 skip connections; .* from 0 to 2"):
        split_deep(make_unet(), depth)


def test_a_second_way_around_the_cut_is_refused() -> None:
    model = make_unet(
        ("out_sample = Conv (last_join, w_out)", "plain = Conv (last_join, w_out)\n    most = ReduceMax (up_twin)\n"
         "    out_sample = Add (plain, most)"),
        ("up = Conv <pads = [1, 1, 1, 1]> (shifted, w_up)", "up, up_twin = Split <axis = 1, num_outputs = 2> (both)"),
        ("    up, ", "    half = Conv <pads = [1, 1, 1, 1]> (shifted, w_up)\n"
         "    both = Concat <axis = 1> (half, half)\n    up, "),
    )  # fmt: skip
    with pytest.raises(PassError, match=r"would be computed in the shallow graph too: .*; choose another depth"):
        split_deep(model)


def test_unknown_sizes_are_refused() -> None:
    model = make_unet()
    find_skip_connections(model.graph)[-1].skip.shape = ir.Shape(["B", 4, None, "W"])
    with pytest.raises(PassError, match=r"the size of the deep features at .* is unknown: .*; run infer-shapes first"):
        split_deep(model)


@pytest.mark.parametrize(
    ("precision", "fuse", "remainder"),
    [
        ("fp32", True, "fp16"),
        ("fp32", False, "fp16"),
        ("fp16", True, "fp16"),
        ("fp16", False, "fp16"),
        ("int8", True, "fp32"),
        ("int8", True, "fp16"),
    ],
)
@pytest.mark.parametrize(("depth", "nodes"), [(0, 0.2), (3, 0.6), (8, 1.0)])
def test_tiny_unet_is_cut_in_every_precision(
    precision: str, fuse: bool, remainder: str, depth: int, nodes: float
) -> None:
    model = typed_unet(precision, fuse=fuse, remainder=remainder)
    # The same operators on the same numbers.
    cached = split_proven(model, [feed("unet")], depth, tolerance=0)
    assert len(find_skip_connections(model.graph)) == 9
    assert len(cached.shallow.graph) < nodes * len(model.graph)


@pytest.mark.parametrize(
    ("component", "count", "exporter"),
    [
        ("unet", 9, DYNAMO),
        *(
            (component, count, exporter)
            for component, count in (("unet", 9), ("sd2_unet", 6), ("sdxl_unet", 6))
            for exporter in ("dynamo-18", "torchscript-17")
        ),
    ],
)
def test_unets_of_other_families_and_exporters_are_cut(exporter: str, component: str, count: int) -> None:
    model = load_graph(component, exporter=exporter)
    run_passes((*canonical_passes(), *fusion_passes("unet")), model)
    found = find_skip_connections(model.graph)
    assert len(found) == count
    cached = split_proven(model, [feed(component)], 0, tolerance=0)
    batch, _, height, width = model.graph.inputs[0].shape or ()
    assert cached.taken.shape == (batch, 64, height, width)
    assert len(cached.shallow.graph) < 0.3 * len(model.graph)


def test_hoisted_inputs_go_only_where_they_are_read() -> None:
    model = typed_unet("fp32")
    hoist(model)
    cached = split_deep(model)
    inputs = [value.name for value in cached.shallow.graph.inputs]
    assert inputs == ["sample", "prompt.20", "prompt.21", "timestep.0", "deep.0"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [0, 5])
def test_both_graphs_can_be_lowered(backend: str, depth: int) -> None:
    model = typed_unet("fp32")
    feeds = feed("unet")
    expected = run_model(model, feeds)["out_sample"]
    cached = split_deep(model, depth)
    for each in (model, cached.shallow):
        run_passes(lowering_passes(backend), each)
    full = run_model(model, feeds)
    shallow = run_model(cached.shallow, wanted_of(cached.shallow, {**feeds, **full}))
    for found in (full, shallow):
        assert np.abs(found["out_sample"] - expected).max() <= FP32 * np.abs(expected).max()
