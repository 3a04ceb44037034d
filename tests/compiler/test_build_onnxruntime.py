import hashlib
import sys

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError, TargetError
from sdc.engines.targets import TARGETS, Target

UNKNOWN = """
<ir_version: 10, opset_import: ["" : 23, "sdc" : 1]>
g (float[B,3,H,W] sample) => (float[B,3,H,W] out_sample) {
    out_sample = sdc.FusedNorm (sample)
}
"""


def test_writes_optimums_names_with_the_weights_beside(small_unet, tmp_path):
    built = build_engine(small_unet.component, TARGETS["ort-cpu"], tmp_path / "unet")
    assert built.files == ("model.onnx", "model.onnx_data")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == sorted(built.files)
    assert (built.options, list(built.built_with)) == ({"weight_bits": 0}, ["onnxruntime"])
    kernel = small_unet.kernel.tobytes()
    assert kernel in (tmp_path / "unet" / "model.onnx_data").read_bytes()
    assert kernel not in (tmp_path / "unet" / "model.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "unet" / "model.onnx", full_check=True)


def test_the_same_graph_gives_the_same_bytes_and_is_not_changed(small_unet, tmp_path):
    before = ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True)
    digests = []
    for name in ("1", "2"):
        built = build_engine(small_unet.component, TARGETS["ort-cpu"], tmp_path / name)
        digests.append([hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in built.files])
    assert digests[0] == digests[1]
    assert ir.to_proto(small_unet.component.model).SerializeToString(deterministic=True) == before


def test_writes_the_weights_file_even_when_every_weight_is_small(small_unet, tmp_path):
    model = ir.from_proto(onnx.parser.parse_model(UNKNOWN.replace("sdc.FusedNorm", "Relu")))
    built = build_engine(Component(small_unet.component.spec, model), TARGETS["ort-cpu"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(built.files)


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_a_refused_graph_leaves_nothing(small_unet, tmp_path, target):
    model = ir.from_proto(onnx.parser.parse_model(UNKNOWN))
    with pytest.raises(ExportError, match=r"ONNX Runtime refuses the graph of unet: .*FusedNorm"):
        build_engine(Component(small_unet.component.spec, model), TARGETS[target], tmp_path)
    assert not list(tmp_path.iterdir())


def contributed(attributes: str = "") -> ir.Model:
    """A graph of one operator that has a kernel for CUDA alone."""
    text = UNKNOWN.replace("sdc.FusedNorm (sample)", f"com.microsoft.NhwcConv {attributes} (sample, w)")
    text = text.replace('"sdc"', '"com.microsoft"').replace("B,3,H,W] sample)", "B,3,H,W] sample, float[3,1,1,W] w)")
    return ir.from_proto(onnx.parser.parse_model(text))


def test_operators_without_a_kernel_for_the_cpu_are_for_a_gpu_alone(small_unet, tmp_path):
    component = Component(small_unet.component.spec, contributed())
    built = build_engine(component, TARGETS["ort-cuda"], tmp_path)
    assert built.files == ("ort-cuda.onnx", "ort-cuda.onnx_data")
    with pytest.raises(ExportError, match=r"refuses the graph of unet: .*NhwcConv"):
        build_engine(component, TARGETS["ort-cpu"], tmp_path / "cpu")


def test_operators_for_a_gpu_are_checked_without_one(small_unet, tmp_path):
    component = Component(small_unet.component.spec, contributed("<strides = 2>"))  # expected a list
    with pytest.raises(ExportError, match="refuses the graph of unet"):
        build_engine(component, TARGETS["ort-cuda"], tmp_path)


@pytest.mark.parametrize(("dtype", "options"), [("float", {}), ("float16", {"allow_tf32": True})])
def test_tensor_cores_are_for_float16(small_unet, tmp_path, dtype, options):
    text = UNKNOWN.replace("sdc.FusedNorm (sample)", "MatMul (sample, sample)").replace("float[", f"{dtype}[")
    model = ir.from_proto(onnx.parser.parse_model(text.replace("B,3,H,W", "B,3,4,4")))
    component = Component(small_unet.component.spec, model)
    built = build_engine(component, TARGETS["ort-cuda"], tmp_path)
    assert {name: value for name, value in built.options.items() if name == "allow_tf32"} == options


def test_a_missing_package_is_named(small_unet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "sdc.compiler.build.onnxruntime", raising=False)
    with pytest.raises(TargetError, match="the target 'ort-cpu' needs the package onnxruntime"):
        build_engine(small_unet.component, TARGETS["ort-cpu"], tmp_path)


def test_an_unknown_backend_is_refused(small_unet, tmp_path):
    with pytest.raises(TargetError, match="no builder for the backend 'abacus'"):
        build_engine(small_unet.component, Target("npu", "abacus"), tmp_path)
