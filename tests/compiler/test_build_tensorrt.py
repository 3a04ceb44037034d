import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError, TargetError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS, Target

trt = pytest.importorskip("tensorrt_rtx")
from sdc.compiler.build import tensorrt  # noqa: E402  (needs tensorrt_rtx)


def attention(*, head_size, dtype, heads=3, tokens="T"):
    """Cross-attention of [B, T] tokens over 77, with float32 inputs and outputs."""
    names = {"float16": 10, "float": 1}
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[B,{heads},{tokens},{head_size}] q, float[B,{heads},77,{head_size}] k, float[B,{heads},77,{head_size}] v)
        => (float[B,{heads},{tokens},{head_size}] y)
    <{dtype}[B,{heads},{tokens},{head_size}] q_cast> {{
        q_cast = Cast <to = {names[dtype]}> (q)
        k_cast = Cast <to = {names[dtype]}> (k)
        v_cast = Cast <to = {names[dtype]}> (v)
        y_cast = Attention (q_cast, k_cast, v_cast)
        y = Cast <to = 1> (y_cast)
    }}
    """
    spec = ComponentSpec(
        name="unet",
        inputs=(
            TensorSpec("q", "float32", ("B", heads, "T", head_size)),
            TensorSpec("k", "float32", ("B", heads, 77, head_size)),
            TensorSpec("v", "float32", ("B", heads, 77, head_size)),
        ),
        outputs=(TensorSpec("y", "float32", ("B", heads, "T", head_size)),),
        dimensions={"B": DimensionRange(1, 2, 4), "T": DimensionRange(16, 48, 256)},
    )
    return Component(spec, ir.from_proto(onnx.parser.parse_model(text)))


def test_writes_one_plan_for_all_gpus_of_the_target(small_unet, tmp_path):
    built = build_engine(small_unet.component, TARGETS["rtx"], tmp_path / "unet")
    assert built.files == ("rtx.plan",)
    assert [path.name for path in (tmp_path / "unet").iterdir()] == ["rtx.plan"]
    assert built.built_with == {"tensorrt_rtx": trt.__version__}
    assert built.details["layers"] >= 5
    assert built.details["attentions"] == 0
    plan = (tmp_path / "unet" / "rtx.plan").read_bytes()
    assert small_unet.kernel.nbytes < len(plan)
    assert trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).get_engine_validity(plan)[1] == 0


def test_a_plan_for_one_gpu_differs_from_a_plan_for_another(small_unet, tmp_path):
    plans = {}
    for name in ("sm86", "sm120"):
        files = build_engine(small_unet.component, TARGETS[name], tmp_path).files
        plans[name] = (tmp_path / files[0]).read_bytes()
    assert plans["sm86"] != plans["sm120"]


def test_the_component_is_not_changed(small_unet, tmp_path):
    before = ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True)
    build_engine(small_unet.component, TARGETS["sm89"], tmp_path)
    assert ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("head_size", "dtype", "unfused"),
    [(40, "float16", 0), (160, "float16", 0), (8, "float16", 1), (512, "float16", 1), (40, "float", 1)],
)
def test_attention_builds_at_every_head_size_and_unfused_ones_are_counted(tmp_path, head_size, dtype, unfused):
    component = attention(head_size=head_size, dtype=dtype)
    built = build_engine(component, TARGETS["sm86"], tmp_path)
    assert built.details["attentions"] == 1
    assert built.details["attentions_without_fused_kernel"] == unfused


@pytest.mark.parametrize(
    ("head_size", "dtype", "fused"), [(12, "float16", True), (256, "float16", True), (8, "float16", False),
                                      (512, "float16", False), (64, "float", False)]
)  # fmt: skip
def test_the_table_of_fused_kernels_is_what_tensorrt_says(tmp_path, monkeypatch, head_size, dtype, fused):
    """Without the permission to compute in several kernels, exactly the unfused attentions are refused."""
    monkeypatch.setattr(tensorrt, "_allow_unfused_attention", lambda _: 0)
    component = attention(head_size=head_size, dtype=dtype)
    if fused:
        build_engine(component, TARGETS["sm86"], tmp_path)
    else:
        with pytest.raises(ExportError, match="not supported by a dedicated kernel"):
            build_engine(component, TARGETS["sm86"], tmp_path)


def two_layers(*, sparse_product):
    """A convolution with dense weights, and a product with 2:4 ones if asked for."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[B,8,H,16] x) => (float[B,12,H,32] y) { c = Conv (x, kernel)  y = MatMul (c, matrix) }
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    random = np.random.default_rng(2)
    matrix = random.standard_normal((16, 32), dtype=np.float32)
    if sparse_product:
        matrix.reshape(4, 4, 32)[:, [0, 3]] = 0
    for name, weight in (("kernel", random.standard_normal((12, 8, 1, 1), dtype=np.float32)), ("matrix", matrix)):
        value = next(each for node in model.graph for each in node.inputs if each.name == name)
        value.const_value = ir.tensor(weight, name=name)
        model.graph.register_initializer(value)
    spec = ComponentSpec(
        name="unet",
        inputs=(TensorSpec("x", "float32", ("B", 8, "H", 16)),),
        outputs=(TensorSpec("y", "float32", ("B", 12, "H", 32)),),
        dimensions={"B": DimensionRange(1, 2, 4), "H": DimensionRange(1, 8, 16)},
    )
    return Component(spec, model)


@pytest.mark.parametrize(("sparse_product", "target", "used"), [(True, "rtx", True), (True, "sm80", True),
                                                               (False, "rtx", False)])  # fmt: skip
def test_sparse_kernels_are_allowed_where_weights_are_sparse(tmp_path, monkeypatch, sparse_product, target, used):
    flags = []

    def watched(*args, **options):
        config = make_config(*args, **options)
        flags.append(config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS))
        return config

    make_config = tensorrt._make_config
    monkeypatch.setattr(tensorrt, "_make_config", watched)
    built = build_engine(two_layers(sparse_product=sparse_product), TARGETS[target], tmp_path)
    assert flags == [used]
    assert built.details["weighted_layers"] == 2
    assert built.details["weighted_layers_2_4"] == int(sparse_product)
    assert built.details["sparse_weights"] == used
    plan = (tmp_path / built.files[0]).read_bytes()
    assert trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).get_engine_validity(plan)[1] == 0


def test_gpus_without_sparse_tensor_cores_are_told_apart():
    """Turing has none; one GPU of several that has them is enough."""
    assert not tensorrt.has_sparse_kernels(TARGETS["sm75"])
    assert all(tensorrt.has_sparse_kernels(TARGETS[name]) for name in ("sm80", "sm86", "sm121", "rtx"))
    assert tensorrt.has_sparse_kernels(Target("sm75+sm86", "tensorrt_rtx", ("sm75", "sm86")))


def test_the_profile_is_the_interface(small_unet):
    spec = small_unet.component.spec
    assert tensorrt._profile_shapes(spec, spec.inputs[0]) == ([1, 3, 4, 4], [2, 3, 8, 12], [4, 3, 32, 32])
    assert tensorrt._profile_shapes(spec, spec.inputs[1]) == ([1], [1], [1])


def test_parser_errors_name_the_node_and_leave_nothing(small_unet, tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 23, "sdc" : 1]>
    g (float[B,3,H,W] sample) => (float[B,3,H,W] out_sample) { out_sample = sdc.FusedNorm (sample) }
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    model.graph[0].name = "mid_block.norm"
    with pytest.raises(ExportError, match=r"cannot read the graph of unet: node mid_block\.norm \(FusedNorm\): "):
        build_engine(Component(small_unet.component.spec, model), TARGETS["rtx"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_turing_without_float32_products_is_explained(small_unet, tmp_path):
    with pytest.raises(ExportError, match=r"FP32 GEMM.*; for sm75 every matrix product must be float16 or int8"):
        build_engine(small_unet.component, TARGETS["sm75"], tmp_path)


def test_an_unknown_gpu_is_refused(small_unet, tmp_path):
    with pytest.raises(TargetError, match="cannot build for sm90; it knows sm75, sm80"):
        build_engine(small_unet.component, Target("sm90", "tensorrt_rtx", ("sm90",)), tmp_path)
