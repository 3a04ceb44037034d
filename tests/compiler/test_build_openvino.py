import hashlib

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from sdc.compiler.build import build_engine
from sdc.compiler.build.openvino import has_reduced_precision
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError
from sdc.engines.kernels.library import find_kernels
from sdc.engines.processor import exact_weight_bits
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.engines.sessions.openvino_group_norm import KernelGroupNorm
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS
from sdc.passes.base import run_passes
from sdc.passes.pipeline import lowering_passes, precision_passes

FLOAT16 = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[B,3,H,W] sample) => (float[B,3,H,W] out_sample) {
    half = Cast <to = 10> (sample)
    doubled = Add (half, half)
    out_sample = Cast <to = 1> (doubled)
}
"""
QUANTIZED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[B,3,H,W] sample) => (float[B,3,H,W] out_sample) <float scale = {0.1}, int8 zero = {0}> {
    quantized = QuantizeLinear (sample, scale, zero)
    out_sample = DequantizeLinear (quantized, scale, zero)
}
"""
EXPANDED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[B,3,T,8] sample) => (float[B,3,T,8] out_sample) {
    out_sample = Attention <is_causal = 1> (sample, sample, sample)
}
"""
UNKNOWN = """
<ir_version: 10, opset_import: ["" : 23, "sdc" : 1]>
g (float[B,3,H,W] sample) => (float[B,3,H,W] out_sample) {
    out_sample = sdc.FusedNorm (sample)
}
"""


NORMALISED_SUMS = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[4,64] x, bfloat16[64,64] weight, float[64] scale) => (float[4,64] normalised) {
    half = Cast <to = 16> (x)
    product = MatMul (half, weight)
    projected = Cast <to = 1> (product)
    total = Add (x, projected)
    mean_free = LayerNormalization (total, scale)
    half_again = Cast <to = 16> (mean_free)
    product_again = MatMul (half_again, weight)
    projected_again = Cast <to = 1> (product_again)
    total_again = Add (total, projected_again)
    narrow = Cast <to = 16> (total_again)
    last_product = MatMul (narrow, weight)
    normalised = Cast <to = 1> (last_product)
}
"""
TOTALS = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[4,64] x, bfloat16[64,64] weight, float[64] scale) => (float[4,64] normalised) {
    one = Add (x, scale)
    two = Add (one, scale)
    three = Add (two, scale)
    rest = Sub (three, x)
    half = Cast <to = 16> (rest)
    kept = Cast <to = 1> (half)
    product = MatMul (half, weight)
    wide = Cast <to = 1> (product)
    nothing = Sub (wide, wide)
    normalised = Add (kept, nothing)
}
"""
BETWEEN_CONVERSIONS = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[4,64] x, bfloat16[64,64] weight, float[64] scale) => (float[4,64] normalised) {
    half = Cast <to = 16> (x)
    product = MatMul (half, weight)
    narrow_scale = Cast <to = 16> (scale)
    mean_free = LayerNormalization <stash_type = 1> (product, narrow_scale)
    product_again = MatMul (mean_free, weight)
    normalised = Cast <to = 1> (product_again)
}
"""


NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[B,4,H,W] x, float[64,4,3,3] first, float[64] gamma, float[64] beta, float[4,64,3,3] last)
    => (float[B,4,H,W] y) {
    images = Conv <pads = [1, 1, 1, 1]> (x, first)
    normalised = GroupNormalization <num_groups = 16> (images, gamma, beta)
    gate = Sigmoid (normalised)
    activated = Mul (normalised, gate)
    y = Conv <pads = [1, 1, 1, 1]> (activated, last)
}
"""


SINUSOIDS = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[1] timestep, float[B,C,H,W] sample) => (float[1,4] out)
    <float[1,2] frequencies = {1.0, 0.25}> {
    row = Unsqueeze (timestep, axes)
    angles = Mul (row, frequencies)
    sines = Sin (angles)
    cosines = Cos (angles)
    embedding = Concat <axis = -1> (sines, cosines)
    half = Cast <to = 16> (embedding)
    doubled = Add (half, half)
    out = Cast <to = 1> (doubled)
}
"""


def parse(text):
    return ir.from_proto(onnx.parser.parse_model(text))


def make_constant(model, *values):
    """Make constants of the last inputs."""
    for each in reversed(values):
        parameter = model.graph.inputs.pop()
        parameter.const_value = ir.tensor(each, name=parameter.name)
        model.graph.register_initializer(parameter)


def digests(folder, names):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def test_writes_optimums_names_and_says_what_it_did(small_unet, tmp_path):
    built = build_engine(small_unet.component, TARGETS["cpu"], tmp_path / "unet")
    assert built.files == ("openvino_model.xml", "openvino_model.bin")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == sorted(built.files)
    assert built.options == {"inference_precision": "f32"}
    assert built.built_with["openvino"].startswith("20")
    assert built.seconds > 0
    # Convolution, two MatMul, Multiply, Add, Unsqueeze, three inputs, an output, weights.
    assert built.details["operators"] >= 10


def test_the_same_graph_gives_the_same_bytes(small_unet, tmp_path):
    component = Component(small_unet.component.spec, parse(EXPANDED))
    first = build_engine(component, TARGETS["cpu"], tmp_path / "1")
    second = build_engine(component, TARGETS["cpu"], tmp_path / "2")
    # OpenVINO makes several operators of one here; it numbers their names through the whole process.
    assert 'name="unnamed/' in (tmp_path / "1" / first.files[0]).read_text()
    assert digests(tmp_path / "1", first.files) == digests(tmp_path / "2", second.files)


def test_the_component_is_not_changed(small_unet, tmp_path):
    before = ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True)
    build_engine(small_unet.component, TARGETS["cpu"], tmp_path)
    assert ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True) == before


def test_float32_weights_stay_float32(small_unet, tmp_path):
    build_engine(small_unet.component, TARGETS["cpu"], tmp_path)
    content = (tmp_path / "openvino_model.bin").read_bytes()
    assert small_unet.kernel.tobytes() in content
    assert small_unet.projection.tobytes() in content


@pytest.mark.parametrize(("text", "precision"), [(FLOAT16, "auto"), (QUANTIZED, "auto")])
def test_a_graph_of_lower_precision_may_use_what_the_processor_has(small_unet, tmp_path, text, precision):
    model = parse(text)
    assert has_reduced_precision(model)
    built = build_engine(Component(small_unet.component.spec, model), TARGETS["cpu"], tmp_path)
    assert built.options["inference_precision"] == precision


@pytest.mark.parametrize("reads_images", [False, True])
def test_sinusoids_of_a_timestep_are_computed_in_float32(tmp_path, reads_images):
    """bf16 has no 501: between 256 and 512 it has even numbers only."""
    model = parse(SINUSOIDS)
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([0]), name="axes"))
    model.graph.register_initializer(axes)
    model.graph.node(0).replace_input_with(1, axes)
    timestep, out = TensorSpec("timestep", "float32", (1,)), TensorSpec("out", "float32", (1, 4))
    images = (TensorSpec("sample", "float32", (1, 4, 8, 8)),) if reads_images else ()
    if not reads_images:
        model.graph.inputs.pop()
    built = build_engine(
        Component(ComponentSpec("unet_timestep", (timestep, *images), (out,), {}), model), TARGETS["cpu"], tmp_path
    )
    assert built.options == {"inference_precision": "auto" if reads_images else "f32"}
    if reads_images:
        return
    files = tuple(tmp_path / name for name in built.files)
    spec = ComponentSpec("unet_timestep", (timestep,), (out,), {})
    with open_session(EngineSource(spec, "openvino", files, built.options)) as session:
        found = session.run({"timestep": np.array([501.0], np.float32)})["out"]
    angles = 501 * np.array([1, 0.25])
    expected = 2 * np.concatenate([np.sin(angles), np.cos(angles)])[None]
    np.testing.assert_allclose(found, expected, rtol=2**-7)


def test_float16_weights_alone_count_as_lower_precision(small_unet):
    model = small_unet.component.model.clone()
    assert not has_reduced_precision(model)
    half = ir.Value(name="half", const_value=ir.tensor(np.zeros(3, np.float16), name="half"))
    half.dtype, half.shape = ir.DataType.FLOAT16, ir.Shape([3])
    model.graph.register_initializer(half)
    assert has_reduced_precision(model)


def test_a_refused_graph_leaves_nothing_and_keeps_what_was_there(small_unet, tmp_path):
    (tmp_path / "openvino_model.xml").write_text("old")
    with pytest.raises(ExportError, match=r"OpenVINO refuses the graph of unet: .*FusedNorm"):
        build_engine(Component(small_unet.component.spec, parse(UNKNOWN)), TARGETS["cpu"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["openvino_model.xml"]
    assert (tmp_path / "openvino_model.xml").read_text() == "old"


def test_replaces_an_older_engine(small_unet, tmp_path):
    (tmp_path / "openvino_model.xml").write_text("old")
    built = build_engine(small_unet.component, TARGETS["cpu"], tmp_path)
    files = tuple(tmp_path / name for name in built.files)
    feeds = small_unet.feeds()
    with open_session(EngineSource(small_unet.component.spec, "openvino", files, built.options)) as session:
        np.testing.assert_allclose(session.run(feeds)["out_sample"], small_unet.answer(feeds), atol=5e-5, rtol=0)


CONVOLUTION = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[B,32,H,W] sample) => (float[B,32,H,W] out_sample)
<float scale = {0.05}, int8 zero = {ZERO}, float[32] steps, int8[32,32,3,3] integers> {
    quantized = QuantizeLinear (sample, scale, zero)
    rounded = DequantizeLinear (quantized, scale, zero)
    kernel = DequantizeLinear <axis = 0> (integers, steps)
    out_sample = Conv <pads = [1, 1, 1, 1]> (rounded, kernel)
}
"""


@pytest.mark.parametrize("zero_point", [0, -100])
def test_a_convolution_of_quantised_tensors_is_computed_in_integers(tmp_path, zero_point):
    """Also where zero is not in the middle of the integers, on whichever processor."""
    generator = np.random.default_rng(2)
    largest = 2 ** (exact_weight_bits() - 1) - 1
    weights = {
        "steps": generator.uniform(0.001, 0.002, 32).astype(np.float32),
        "integers": generator.integers(-largest, largest + 1, (32, 32, 3, 3), np.int8),
    }
    text = CONVOLUTION.replace("{ZERO}", f"{{{zero_point}}}")
    model = onnx.parser.parse_model(text.replace(", float[32] steps, int8[32,32,3,3] integers", ""))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    free = {"B": DimensionRange(1, 2, 8), "H": DimensionRange(1, 16, 64), "W": DimensionRange(1, 16, 64)}
    shape = ("B", 32, "H", "W")
    spec = ComponentSpec(
        "unet", (TensorSpec("sample", "float32", shape),), (TensorSpec("out_sample", "float32", shape),), free
    )
    built = build_engine(Component(spec, ir.from_proto(model)), TARGETS["cpu"], tmp_path)
    sample = generator.normal(4, 2, (2, 32, 12, 20)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"sample": sample})
    files = tuple(tmp_path / name for name in built.files)
    with open_session(EngineSource(spec, "openvino", files, built.options)) as session:
        found = session.run({"sample": sample})["out_sample"]
        (convolution,) = [
            node for node in session._engine.model.get_runtime_model().get_ops()
            if node.get_rt_info()["layerType"].astype(str) == "Convolution"
        ]  # fmt: skip
    assert convolution.get_rt_info()["primitiveType"].astype(str).lower().endswith("i8")
    # Values next to a boundary between two integers may be rounded to either.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def _build_with_weights(text, folder):
    """The engine of a graph of `weight` and `scale`."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    generator = np.random.default_rng(0)
    weight = (generator.standard_normal((64, 64)) / 8).astype(ml_dtypes.bfloat16)
    make_constant(model, weight, np.ones(64, np.float32))
    spec = ComponentSpec(
        "text_encoder", (TensorSpec("x", "float32", (4, 64)),), (TensorSpec("normalised", "float32", (4, 64)),), {}
    )
    built = build_engine(Component(spec, model), TARGETS["cpu"], folder)
    return EngineSource(spec, "openvino", tuple(folder / name for name in built.files), built.options)


def test_sums_in_float32_are_executed_so_and_products_in_bfloat16(tmp_path):
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes everything in float32")
    with open_session(_build_with_weights(NORMALISED_SUMS, tmp_path)) as session:
        session.run({"x": np.ones((4, 64), np.float32)})
        executed = [node.get_rt_info() for node in session._engine.model.get_runtime_model().get_ops()]
    precisions = {(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in executed}
    assert {("MVN", "f32"), ("FullyConnected", "bf16")} <= precisions
    assert {precision for kind, precision in precisions if kind == "MVN"} == {"f32"}
    assert {precision for kind, precision in precisions if kind == "FullyConnected"} == {"bf16"}


def test_a_small_addend_of_a_large_sum_is_not_rounded_away(tmp_path):
    """bf16 has no number between 1024 and 1032."""
    with open_session(_build_with_weights(TOTALS, tmp_path)) as session:
        found = session.run({"x": np.full((4, 64), 1024, np.float32)})["normalised"]
    np.testing.assert_allclose(found, 3.0, atol=2**-6)


@pytest.mark.parametrize(
    ("text", "precision"), [(NORMALISED_SUMS, "f32"), (TOTALS, "f32"), (BETWEEN_CONVERSIONS, "auto")]
)
def test_what_float32_sums_need(tmp_path, text, precision):
    assert _build_with_weights(text, tmp_path).options == {"inference_precision": precision}


def test_scale_and_shift_of_a_norm_reach_the_kernel_in_float32(tmp_path):
    """From the checkpoint's float32 through the passes, the file of a bf16 engine and its session."""
    if isinstance(find_kernels(), str):
        pytest.skip("there are no kernels here")
    random = np.random.default_rng(5)
    gamma, beta = (1 + np.linspace(0, 1e-2, 64) * sign for sign in (1, -1))
    first, last = (random.standard_normal(shape) / 8 for shape in ((64, 4, 3, 3), (4, 64, 3, 3)))
    model = parse(NORM)
    make_constant(model, *(each.astype(np.float32) for each in (first, gamma, beta, last)))
    run_passes(precision_passes("bf16", backend="openvino"), model)
    run_passes(lowering_passes("openvino"), model)
    sizes = {"B": DimensionRange(1, 2, 4), "H": DimensionRange(48, 48, 96), "W": DimensionRange(40, 40, 96)}
    tensors = ((TensorSpec(name, "float32", ("B", 4, "H", "W")),) for name in ("x", "y"))
    spec = ComponentSpec("vae_decoder", *tensors, sizes)
    built = build_engine(Component(spec, model), TARGETS["cpu"], tmp_path)
    source = EngineSource(spec, "openvino", tuple(tmp_path / name for name in built.files), built.options)
    with open_session(source) as session:
        session.run({"x": random.standard_normal((2, 4, 48, 40), np.float32)})
        norms = [each for each in session._engine.replacements.operators if isinstance(each, KernelGroupNorm)]
        assert norms
        for norm in norms:  # one, and copies of it in what is compiled
            np.testing.assert_allclose(norm.settings.affine.weight, gamma, rtol=1e-6)
            np.testing.assert_allclose(norm.settings.affine.bias, beta, rtol=1e-6)
