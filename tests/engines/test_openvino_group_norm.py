"""Group normalisation of the CPU kernels inside of OpenVINO models."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from attention_reference import floats_from_bits
from openvino import opset13 as operators
from openvino_models import executed, named, open_model, operators_alive

from sdc.engines.sessions.openvino_group_norm import KernelGroupNorm, Sum, replace_group_norms, sums_taken
from sdc.engines.sessions.openvino_operators import Replacements, round_constants
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

CHANNELS, GROUPS = 64, 16
FREE = {"B": DimensionRange(1, 2, 4), "H": DimensionRange(1, 48, 96), "W": DimensionRange(1, 40, 96)}
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("B", 4, "H", "W")), TensorSpec("time", "float32", (1, CHANNELS, 1, 1))),
    (TensorSpec("y", "float32", ("B", 4, "H", "W")),),
    FREE,
)
LARGE = {"x": (2, 4, 48, 40), "time": (1, CHANNELS, 1, 1)}


def constant(*shape: int, seed: int, element_type: str = "f32", scale: float = 1.0):
    values = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return operators.convert(operators.constant(values), element_type)


def convolve(x, channels: int, *, seed: int, element_type: str):
    inputs = x.get_output_partial_shape(0)[1].get_length()
    weight = constant(channels, inputs, 3, 3, seed=seed, element_type=element_type, scale=(9 * inputs) ** -0.5)
    y = operators.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return operators.add(y, constant(1, channels, 1, 1, seed=seed + 1, element_type=element_type))


def normalise(
    images, *, silu: bool = True, element_type: str = "f32", batch_norm: bool = True, axes=(2,),
    mode: str = "inside_sqrt", variance: bool = True, restored: tuple[int, ...] | None = None,
) -> list:  # fmt: skip
    """As exports write it: what has all maps and SiLU; what has not SiLU yet; what has groups still."""
    reshaped = operators.reshape(images, np.array([0, GROUPS, -1]), True)
    normalised = operators.mvn(reshaped, np.array(axes), variance, 1e-5, mode)
    scaled = operators.multiply(normalised, constant(1, GROUPS, 1, seed=2, element_type=element_type))
    target = operators.shape_of(images) if restored is None else operators.constant(np.array(restored))
    whole = operators.reshape(scaled, target, True)
    if batch_norm:
        weights = [constant(CHANNELS, seed=seed, element_type=element_type) for seed in (3, 4, 5)]
        spread = operators.convert(operators.constant(np.full(CHANNELS, 1.5, np.float32)), element_type)
        whole = operators.batch_norm_inference(whole, *weights, spread, 1e-3)
    else:
        whole = operators.multiply(whole, constant(1, CHANNELS, 1, 1, seed=3, element_type=element_type))
        whole = operators.add(constant(CHANNELS, 1, 1, seed=4, element_type=element_type), whole)
    return [operators.multiply(whole, operators.sigmoid(whole)) if silu else whole, whole, scaled]


def build_model(
    *,
    time: bool = False,
    sums: int = 0,
    levels: int | None = None,
    reader: int = 0,
    element_type: str = "f32",
    **options,
) -> openvino.Model:
    """Convolution, normalisation, convolution; every precondition of the replacement can be broken.

    Args:
        time: whether [1, C, 1, 1] is added to images first.
        sums: number of blocks of a residual network before the normalisation, whose sums are normalised.
        levels: that the normalised images are rounded to.
        reader: which of what `normalise` gives something else reads too; 0 for none.
        element_type: of the computation.
        options: of `normalise`.
    """
    x = operators.parameter([-1, 4, -1, -1], openvino.Type.f32, name="x")
    addend = operators.parameter([1, CHANNELS, 1, 1], openvino.Type.f32, name="time")
    images = convolve(operators.convert(x, element_type), CHANNELS, seed=0, element_type=element_type)
    images = operators.add(images, operators.convert(addend, element_type)) if time else images
    for index in range(sums):
        branch = normalise(images, element_type=element_type)[0]
        images = operators.add(convolve(branch, CHANNELS, seed=8 + index, element_type=element_type), images)
    steps = normalise(images, element_type=element_type, **options)
    rounded = operators.fake_quantize(steps[0], -3.0, 3.0, -3.0, 3.0, levels) if levels else steps[0]
    y = operators.convert(convolve(rounded, 4, seed=6, element_type=element_type), "f32")
    model = openvino.Model([y, *([operators.relu(steps[reader])] if reader else [])], [x, addend], "group norm")
    return named(model, "x", "time")


def feeds(*, batch: int = 2, height: int = 48, width: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "x": generator.standard_normal((batch, 4, height, width), np.float32),
        "time": 3 * generator.standard_normal((1, CHANNELS, 1, 1), np.float32),
    }


def replaced(model: openvino.Model, kernels, shapes=LARGE) -> list:
    """The operators that are put into a model."""
    replacements = Replacements()
    replace_group_norms(model, kernels, shapes, replacements)
    return replacements.operators


OPTIONS = (
    {}, {"silu": False}, {"element_type": "f16"}, {"element_type": "bf16"}, {"batch_norm": False}, {"time": True},
    {"time": True, "element_type": "bf16", "silu": False}, {"levels": 256}, {"axes": (-1,)},
    {"sums": 2}, {"sums": 1, "element_type": "bf16", "silu": False}, {"sums": 1, "time": True, "element_type": "f16"},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_put_in_and_no_further_from_float32_than_openvinos_own(kernels, monkeypatch, tmp_path, options):
    found, kinds = {}, {}
    for name, precision, switch in (
        ("exact", "f32", "1"),
        ("openvino", "bf16", "0"),
        ("attention", "bf16", "attention"),
        ("kernel", "bf16", "1"),
    ):
        monkeypatch.setenv("SDC_KERNELS", switch)
        # A model of bf16 is computed in bf16, whatever is asked for.
        built = build_model(**(options | {"element_type": "f32"} if name == "exact" else options))
        with open_model(SPEC, built, tmp_path, precision) as session:
            found[name] = session.run(feeds())["y"]
            kinds[name] = executed(session)
            norms = 1 + options.get("sums", 0)
            assert kinds[name].count("Reference") == (norms if name == "kernel" else 0)
            assert kinds[name].count("MVN") == (0 if name == "kernel" else norms)
    errors = {name: np.linalg.norm(found[name] - found["exact"]) for name in ("openvino", "kernel")}
    # Images, weights and what is normalised are rounded to bf16, each by up to 2^-8; to 256 levels, to 6 / 255 each.
    assert errors["kernel"] < (0.02 if "levels" in options else 0.01) * np.linalg.norm(found["exact"])
    # OpenVINO rounds to 256 levels what it has in float32 still, and the kernel gives bf16.
    assert errors["kernel"] <= (1.15 if "levels" in options else 1.05) * errors["openvino"]
    np.testing.assert_array_equal(found["attention"], found["openvino"])


def exact_constants(model: openvino.Model) -> np.ndarray:
    """Give the normalisation of a model in bf16 a weight in float32 behind a conversion, as engines have it."""
    (norm,) = (node for node in model.get_ordered_ops() if node.get_type_name() == "BatchNormInference")
    weight = (1 + np.linspace(0, 1e-2, CHANNELS)).astype(np.float32)
    norm.input(1).replace_source_output(operators.convert(operators.constant(weight), "bf16").output(0))
    return weight


def test_weights_are_those_before_they_were_rounded(kernels):
    model = build_model(element_type="bf16")
    weight = exact_constants(model)
    (operator,) = replaced(model, kernels)
    of_groups = (operator.settings.affine.weight / weight).reshape(GROUPS, -1)
    assert np.allclose(of_groups, of_groups[:, :1], rtol=1e-5)


def test_what_openvino_converts_is_rounded_to_the_nearest():
    """It would cut bits off: 1 - 2^-10 would become 1 - 2^-8."""
    largest = np.finfo(np.float32).max
    values = np.array([1 - 2**-10, 1 + 2**-9, -1 - 3 * 2**-9, np.inf, 0, largest, np.nan], np.float32)
    x = operators.parameter([7], openvino.Type.bf16, name="x")
    y = operators.add(x, operators.convert(operators.constant(values), "bf16"))
    model = openvino.Model([y], [x], "constants")
    round_constants(model)
    (constant,) = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    assert not any(node.get_type_name() == "Convert" for node in model.get_ops())
    found = floats_from_bits(constant.data.view(np.uint16))
    assert found[:5].tolist() == [1, 1, -1 - 2**-7, np.inf, 0]
    assert 3.3e38 < found[5] <= largest
    assert np.isnan(found[6])


@pytest.mark.parametrize("options", [{"time": True}, {"sums": 3}], ids=str)
def test_images_stay_channels_last(kernels, tmp_path, options):
    """Neither transposed nor reordered between the convolutions, and nothing is added elsewhere."""
    with open_model(SPEC, build_model(**options), tmp_path, "bf16") as session:
        session.run(feeds())
        nodes = session._engine.model.get_runtime_model().get_ops()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
        reorders = [
            node.get_friendly_name()
            for node in nodes
            if node.get_rt_info()["layerType"].astype(str) == "Reorder"
            and CHANNELS in [dimension.get_max_length() for dimension in node.get_output_partial_shape(0)]
        ]
        assert "Transpose" not in kinds
        assert "Eltwise" not in kinds
        assert all("fake" in name or "Constant" in name for name in reorders), reorders


def test_takes_several_shapes_in_turn(kernels, tmp_path):
    with (
        open_model(SPEC, build_model(time=True, sums=1), tmp_path, "bf16") as session,
        open_model(SPEC, build_model(time=True, sums=1), tmp_path, "f32") as exact,
    ):
        for sizes in ({"batch": 1, "height": 5, "width": 9}, {}, {"batch": 3, "height": 33, "width": 47}):
            given = feeds(**sizes)
            expected = exact.run(given)["y"]
            assert np.linalg.norm(session.run(given)["y"] - expected) < 0.01 * np.linalg.norm(expected)
        assert executed(session).count("Reference") == 2


def test_runs_make_no_operators_that_stay(kernels, tmp_path):
    with open_model(SPEC, build_model(), tmp_path, "bf16") as session:
        session.run(feeds())
        session.run(feeds(height=47))  # from now on it takes any size
        before = operators_alive(KernelGroupNorm)
        for height in (48, 47, 48):
            session.run(feeds(height=height))
        assert operators_alive(KernelGroupNorm) == before > 0


@pytest.mark.parametrize(
    "options",
    [
        {"axes": (1,)},
        {"mode": "outside_sqrt"},
        {"variance": False},
        {"reader": 2},
        {"restored": (0, CHANNELS, 40, 48)},
    ],
    ids=str,
)
def test_leaves_other_patterns_alone(kernels, options):
    model = build_model(**options)
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    assert not replaced(model, kernels)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before


def test_silu_is_left_alone_where_something_else_reads_what_is_before_it(kernels):
    (operator,) = replaced(build_model(reader=1), kernels)
    assert not operator.settings.silu
    (operator,) = replaced(build_model(), kernels)
    assert operator.settings.silu


def test_leaves_small_ones_alone_and_shapes_free(kernels):
    model = build_model()
    free = [port.get_partial_shape() for port in model.inputs]
    assert not replaced(model, kernels, LARGE | {"x": (2, 4, 8, 8)})
    assert replaced(model, kernels)
    assert [port.get_partial_shape() for port in model.inputs] == free


def test_a_sum_that_broadcasts_is_left_alone(kernels):
    """Images of a fixed batch of 1 are like the others where the shapes to tell sizes by have a batch of 1."""
    x = operators.parameter([-1, CHANNELS, -1, -1], openvino.Type.f32, name="x")
    for batch, expected in ((-1, Sum.IMAGES), (1, Sum.NOTHING)):
        other = operators.parameter([batch, CHANNELS, -1, -1], openvino.Type.f32, name="other")
        model = openvino.Model([normalise(operators.add(x, other))[0]], [x, other], "sum")
        for port, name in zip(model.inputs, ("x", "other"), strict=True):
            port.get_tensor().set_names({name})
        (operator,) = replaced(model, kernels, dict.fromkeys(("x", "other"), (1, CHANNELS, 48, 40)))
        assert operator.sum is expected


@pytest.mark.parametrize(
    ("options", "shapes", "count"),
    [({"sums": 2}, LARGE, 2), ({"sums": 2}, LARGE | {"x": (2, 4, 8, 8)}, 0), ({"time": True}, LARGE, 0)],
)
def test_sums_that_will_be_taken_are_known_beforehand(kernels, options, shapes, count):
    model = build_model(**options)
    sums = [node for node in model.get_ops() if node.get_type_name() == "Add"]
    for node in sums:
        node.output(0).get_tensor().set_names({f"sum {node.get_friendly_name()}"})
    taken = sums_taken(model, shapes)
    assert taken < {f"sum {node.get_friendly_name()}" for node in sums}
    assert len(taken) == count == sum(each.sum is Sum.IMAGES for each in replaced(model, kernels, shapes))
