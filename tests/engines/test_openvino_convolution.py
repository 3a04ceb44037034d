"""Convolutions of the CPU kernels inside of OpenVINO models."""

from __future__ import annotations

import gc

import numpy as np
import openvino
import pytest
from openvino import opset13 as operators
from openvino_models import constant, executed, named, open_model

from sdc.engines.kernels.convolution import Quantisation
from sdc.engines.sessions.openvino_convolution import convolutions_taken, replace_convolutions
from sdc.engines.sessions.openvino_layout import interleave_channels_last
from sdc.engines.sessions.openvino_operators import Replacements
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

CHANNELS = 256
FREE = {"B": DimensionRange(1, 2, 4), "H": DimensionRange(1, 16, 96), "W": DimensionRange(1, 16, 96)}
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", 4, "H", "W")),),
    (TensorSpec("y", "float32", ("B", 4, "H", "W")),),
    FREE,
)
USUAL = {"x": (2, 4, 16, 16)}


def convolve(
    x, outputs: int, *, seed: int, element_type: str = "f32", bytes: bool = False, bias: bool = True, window: int = 3,
    strides=(1, 1), begin: int | None = None, dilations=(1, 1), half: bool = False,
) -> list:  # fmt: skip
    """With bias and without; of bytes, images are quantised first."""
    generator = np.random.default_rng(seed)
    inputs = x.get_output_partial_shape(0)[1].get_length()
    shape = (outputs, inputs, window, window)
    if bytes:
        quantised = operators.fake_quantize(operators.convert(x, "f32"), -0.6, 4.5, -0.6, 4.5, 256)
        x = operators.convert(quantised, element_type)
        integers = operators.constant(generator.integers(-127, 128, shape, np.int8))
        scales = constant(generator.uniform(0.5, 1.5, (outputs, 1, 1, 1)) / 73 / np.sqrt(9 * inputs), element_type)
        weight = operators.multiply(operators.convert(integers, element_type), scales)
    elif half:
        floats = generator.standard_normal(shape) / np.sqrt(window**2 * inputs)
        weight = operators.convert(operators.constant(floats.astype(np.float16)), element_type)
    else:
        weight = constant(generator.standard_normal(shape) / np.sqrt(window**2 * inputs), element_type)
    margin = window // 2
    pads = [margin if begin is None else begin] * 2
    y = operators.convolution(x, weight, list(strides), pads, [margin] * 2, list(dilations))
    return [operators.add(y, constant(generator.standard_normal((1, outputs, 1, 1)), element_type)) if bias else y, y]


def build_model(*, element_type: str = "f32", reader: int = 0, skip: bool = False, joined: int = 0, **options):
    """Three convolutions, of which the middle one is large.

    Args:
        element_type: of the computation.
        reader: which of what `convolve` gives something else reads too; 0 for none.
        skip: whether the middle one's input is added to its result.
        joined: how many more pairs of convolutions of joined images follow.
        options: of `convolve`.
    """
    x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
    first = convolve(operators.convert(x, element_type), CHANNELS, seed=0, element_type=element_type)[0]
    first = operators.relu(first)
    steps = convolve(first, CHANNELS, seed=1, element_type=element_type, **options)
    images = operators.add(steps[0], first) if skip else steps[0]
    for index in range(joined):
        both = operators.concat([images, first], 1)
        images = convolve(both, CHANNELS, seed=4 + index, element_type=element_type, **options)[0]
    y = operators.convert(convolve(images, 4, seed=2, element_type=element_type)[0], "f32")
    model = openvino.Model([y, *([operators.relu(steps[reader])] if reader else [])], [x], "convolution")
    return named(model)


def feeds(*, batch: int = 2, height: int = 16, width: int = 16) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal((batch, 4, height, width), np.float32)}


def replaced(model: openvino.Model, convolver, shapes=USUAL) -> list:
    """The operators that are put into a model."""
    replacements = Replacements()
    replace_convolutions(model, convolver, shapes, replacements)
    return replacements.operators


OPTIONS = (
    {}, {"bias": False}, {"element_type": "bf16"}, {"skip": True}, {"window": 5}, {"window": 1},
    {"half": True}, {"half": True, "element_type": "f16"},
    {"bytes": True}, {"bytes": True, "element_type": "f16"}, {"bytes": True, "bias": False, "skip": True},
    {"joined": 2}, {"joined": 1, "bytes": True},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_put_in_and_no_further_from_float32_than_openvinos_own(convolver, monkeypatch, tmp_path, options):
    found = {}
    size = 64 if options.get("window") == 1 else 16
    given = feeds(height=size, width=size)
    for name, precision, switch in (("exact", "f32", "1"), ("openvino", "bf16", "attention"), ("kernel", "bf16", "1")):
        monkeypatch.setenv("SDC_KERNELS", switch)
        # A model of bf16 is computed in bf16, whatever is asked for.
        built = build_model(**(options | {"element_type": "f32"} if name == "exact" else options))
        with open_model(SPEC, built, tmp_path, precision) as session:
            found[name] = session.run(given)["y"]
            kinds = executed(session)
        replaced_ones = 1 + 2 * options.get("joined", 0) if name == "kernel" else 0
        assert kinds.count("Reference") == replaced_ones
        assert kinds.count("Convolution") == (2 if name == "kernel" else 3 + options.get("joined", 0))
    errors = {name: np.linalg.norm(found[name] - found["exact"]) for name in ("openvino", "kernel")}
    assert errors["kernel"] < 0.01 * np.linalg.norm(found["exact"])
    assert errors["kernel"] <= 1.1 * errors["openvino"]


@pytest.mark.parametrize("skip", [False, True])
def test_images_stay_channels_last(convolver, tmp_path, skip):
    """Neither transposed nor reordered between kernels."""
    with open_model(SPEC, build_model(joined=2, skip=skip), tmp_path, "bf16") as session:
        session.run(feeds())
        assert "Transpose" not in executed(session)


def build_projections(*, element_type: str = "f32") -> openvino.Model:
    """Images to tokens and back, as transformers of a UNet have it, between products of matrices."""
    x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
    images = convolve(operators.convert(x, element_type), CHANNELS, seed=0, element_type=element_type)[0]
    images = convolve(images, CHANNELS, seed=1, element_type=element_type, window=1)[0]
    last = operators.transpose(images, np.array([0, 2, 3, 1]))
    tokens = operators.relu(operators.reshape(last, np.array([0, -1, CHANNELS]), True))
    last = operators.reshape(tokens, operators.shape_of(last), False)
    images = operators.transpose(last, np.array([0, 3, 1, 2]))
    images = convolve(images, CHANNELS, seed=2, element_type=element_type, window=1)[0]
    images = operators.convert(convolve(images, 4, seed=3, element_type=element_type)[0], "f32")
    model = openvino.Model([images], [x], "projections")
    return named(model)


@pytest.mark.parametrize("element_type", ["f32", "f16", "bf16"])
def test_projections_of_tokens_move_nothing(convolver, tmp_path, element_type):
    given = feeds(height=64, width=64)
    with open_model(SPEC, build_projections(element_type=element_type), tmp_path, "bf16") as session:
        found = session.run(given)["y"]
        kinds = executed(session)
    assert kinds.count("Reference") == 2
    assert "Transpose" not in kinds
    with open_model(SPEC, build_projections(), tmp_path, "f32") as exact:
        expected = exact.run(given)["y"]
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_takes_several_shapes_in_turn(convolver, tmp_path):
    with (
        open_model(SPEC, build_model(joined=1), tmp_path, "bf16") as session,
        open_model(SPEC, build_model(joined=1), tmp_path, "f32") as exact,
    ):
        for sizes in ({"batch": 1, "height": 5, "width": 9}, {}, {"batch": 3, "height": 33, "width": 47}):
            given = feeds(**sizes)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)
        assert executed(session).count("Reference") == 3


def packed_alive() -> int:
    gc.collect()
    return sum(each.weights is not None for each in gc.get_objects() if type(each).__name__ == "KernelConvolution")


def test_weights_are_let_go(convolver, tmp_path):
    before = packed_alive()
    with open_model(SPEC, build_model(), tmp_path, "bf16") as session:
        session.run(feeds())
        assert packed_alive() > before
        session.run(feeds(height=17))  # from now on it takes any size
        alive = packed_alive()
        session.run(feeds())
        session.run(feeds(height=15))
        assert packed_alive() == alive
    assert packed_alive() == before


@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 1)},
        {"dilations": (1, 2)},
        {"begin": 2},
    ],
    ids=str,
)
def test_leaves_other_convolutions_alone(packer, options):
    model = build_model(**options)
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    assert not replaced(model, packer)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before


@pytest.mark.parametrize(
    ("low", "high", "output_high", "levels"),
    [(0.1, 4.5, 4.5, 256), (-0.6, 4.5, 4.4, 256), (-0.605, 4.5, 4.5, 256), (-0.6, 4.5, 4.5, 255)],
    ids=str,
)
def test_other_ways_to_quantise_are_left_alone(packer, low, high, output_high, levels):
    """A range without zero, results in another range, a zero that is no integer, other levels."""
    model = build_model(bytes=True)
    (rounding,) = (node for node in model.get_ops() if node.get_type_name() == "FakeQuantize")
    for index, bound in enumerate((low, high, low, output_high)):
        rounding.input(index + 1).replace_source_output(operators.constant(np.float32(bound)).output(0))
    attributes = rounding.get_attributes()
    if levels != 256:
        other = operators.fake_quantize(*rounding.input_values(), levels)
        rounding.output(0).replace(other.output(0))
    assert attributes["levels"] == 256
    assert not replaced(model, packer)


def test_one_behind_another(convolver, tmp_path):
    """What the second one reads is the first one's result, which is replaced first."""

    def build() -> openvino.Model:
        x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
        images = convolve(x, CHANNELS, seed=0)[0]
        for seed in (1, 2, 3):
            images = convolve(images, CHANNELS, seed=seed, bias=False)[0]
        return named(openvino.Model([convolve(images, 4, seed=4)[0]], [x], "chain"))

    with open_model(SPEC, build(), tmp_path, "bf16") as session:
        found = session.run(feeds())["y"]
        kinds = executed(session)
    assert (kinds.count("Reference"), kinds.count("Convolution")) == (3, 2)
    with open_model(SPEC, build(), tmp_path, "f32") as exact:
        expected = exact.run(feeds())["y"]
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (CHANNELS, CHANNELS, 1, 1)], ids=str)
def test_other_scales_of_weights_are_left_alone(packer, shape):
    """One for each input, of which there are as many as outputs; one for each pair."""
    model = build_model(bytes=True)
    (product,) = (node for node in model.get_ops() if node.get_type_name() == "Multiply")
    product.input(1).replace_source_output(constant(np.full(shape, 0.01)).output(0))
    assert not replaced(model, packer)


def test_too_many_products_of_bytes_are_left_alone(packer):
    for channels, expected in ((7310, 1), (7311, 0)):  # times 9; 65,793 are the most
        x = operators.parameter([1, channels, 4, 4], openvino.Type.f32, name="x")
        model = openvino.Model([convolve(x, 256, seed=1, bytes=True)[0]], [x], "large")
        model.inputs[0].get_tensor().set_names({"x"})
        assert len(replaced(model, packer, {"x": (1, channels, 4, 4)})) == expected


def test_integers_that_become_floats_are_no_images(convolver, tmp_path):
    """A conversion that cuts numbers off is no layout."""
    x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
    images = operators.multiply(convolve(x, CHANNELS, seed=0)[0], np.float32(4))
    whole = operators.convert(operators.convert(images, "i32"), "f32")
    model = named(openvino.Model([convolve(convolve(whole, CHANNELS, seed=1)[0], 4, seed=2)[0]], [x], "whole"))
    with open_model(SPEC, model, tmp_path, "bf16") as session:
        found = session.run(feeds())["y"]
        assert executed(session).count("Reference") == 1
    with open_model(SPEC, model, tmp_path, "f32") as exact:
        expected = exact.run(feeds())["y"]
    # Where bf16 makes another integer of a number, one of 256 channels differs by one.
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_other_ranks_are_left_alone(packer):
    for rank in (1, 3):
        x = operators.parameter([1, 64, *[16] * rank], openvino.Type.f32, name="x")
        weight = constant(np.zeros((64, 64, *[3] * rank)))
        ones = [1] * rank
        model = openvino.Model([operators.convolution(x, weight, ones, ones, ones, ones)], [x], "rank")
        model.inputs[0].get_tensor().set_names({"x"})
        assert not replaced(model, packer, {"x": (1, 64, *[16] * rank)})


def test_the_bias_is_left_alone_where_something_else_reads_what_is_before_it(packer):
    (operator,) = replaced(build_model(reader=1), packer)
    assert not operator.weights.offsets.any()
    (operator,) = replaced(build_model(), packer)
    assert operator.weights.offsets.any()


def test_how_images_are_quantised(packer):
    (operator,) = replaced(build_model(bytes=True), packer)
    assert operator.weights.quantisation == Quantisation(pytest.approx(0.02), 30)


def test_leaves_small_and_large_ones_alone_and_shapes_free(packer):
    model = build_model()
    free = [port.get_partial_shape() for port in model.inputs]
    assert not replaced(model, packer, {"x": (2, 4, 8, 8)})
    assert not replaced(model, packer, {"x": (2, 4, 33, 32)})
    assert replaced(model, packer)
    assert [port.get_partial_shape() for port in model.inputs] == free


@pytest.mark.parametrize(
    ("options", "shape", "count"),
    [
        ({"joined": 1}, (2, 4, 16, 16), 2),
        ({"bytes": True}, (2, 4, 16, 16), 1),
        ({"half": True, "element_type": "f16"}, (2, 4, 16, 16), 1),
        ({"joined": 1}, (1, 4, 2, 2), 0),
        ({"strides": (2, 2)}, (2, 4, 16, 16), 0),
    ],
)
def test_what_will_be_taken_is_known_beforehand(packer, options, shape, count):
    model = build_model(**options)
    free = model.inputs[0].get_partial_shape()
    taken = convolutions_taken(model, {"x": shape})
    assert model.inputs[0].get_partial_shape() == free
    large = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Convolution"}
    assert taken <= large
    assert len(taken) == len(replaced(model, packer, {"x": shape})) == count


def build_phases(*, block: int = 2, mode: str = "blocks_first", outputs: int = CHANNELS) -> openvino.Model:
    """Upsampling by four convolutions of the small images."""
    x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
    images = convolve(x, CHANNELS, seed=0)[0]
    phases = []
    for index in range(4):
        generator = np.random.default_rng(10 + index)
        weight = constant(generator.standard_normal((outputs, CHANNELS, 2, 2)) / np.sqrt(4 * CHANNELS))
        begin, end = [1 - index // 2, 1 - index % 2], [index // 2, index % 2]
        phases.append(operators.convolution(images, weight, [1, 1], begin, end, [1, 1]))
    large = operators.depth_to_space(operators.concat(phases, 1), mode, block)
    model = openvino.Model([convolve(large, 4, seed=2)[0]], [x], "phases")
    return named(model)


@pytest.mark.parametrize(("size", "kernel_convolutions"), [(24, 4), (40, 0)])
def test_phases_are_interleaved_channels_last(convolver, tmp_path, size, kernel_convolutions):
    given = feeds(height=size, width=size)
    with open_model(SPEC, build_phases(), tmp_path, "bf16") as session:
        found = session.run(given)["y"]
        kinds = executed(session)
    assert kinds.count("Reference") == 1 + kernel_convolutions
    assert not {"Transpose", "DepthToSpace", "Concatenation"} & set(kinds)
    with open_model(SPEC, build_phases(), tmp_path, "f32") as exact:
        expected = exact.run(given)["y"]
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_phases_of_several_sizes_in_turn(convolver, tmp_path):
    with (
        open_model(SPEC, build_phases(), tmp_path, "bf16") as session,
        open_model(SPEC, build_phases(), tmp_path, "f32") as exact,
    ):
        for size in (8, 24, 33):
            given = feeds(height=size, width=size + 1)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("options", [{"mode": "depth_first"}, {"block": 4}], ids=str)
def test_leaves_other_ways_from_depth_to_space_alone(kernels, options):
    model = build_phases(**options)
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    interleave_channels_last(model, kernels, Replacements())
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before
