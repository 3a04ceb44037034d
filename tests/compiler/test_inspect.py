"""Descriptions of bundles and engine files, and what is said of damaged ones."""

import argparse
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from whole_bundle import CHANNELS, VOCABULARY, WIDTH, write_whole_bundle

from sdc.compiler.cli import inspect as command
from sdc.compiler.inspect.inspect import BundleDescription, FusionCount, inspect_engine, inspect_path
from sdc.compiler.inspect.plan_file import inspect_plan
from sdc.compiler.inspect.report import format_bundle, format_engine
from sdc.engines.errors import BundleError, InputError
from sdc.engines.specs import DimensionRange, TensorSpec
from sdc.engines.targets import COMPUTE_CAPABILITIES

CONVOLUTION_WEIGHTS = CHANNELS * CHANNELS * 9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_bundle(tmp_path_factory.mktemp("inspect") / "small", targets=("ort-cpu", "cpu"))


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true")  # which every command has
    return command.run(parser.parse_args(arguments))


def test_bundle(bundle: Path) -> None:
    found = inspect_path(bundle)
    assert isinstance(found, BundleDescription)
    assert set(found.engines) == {"ort-cpu", "cpu"}
    unet = found.engines["ort-cpu"]["unet"]
    assert unet.operators == {"Add": 2, "Conv": 1, "MatMul": 1, "Mul": 1, "ReduceMean": 1, "Tanh": 1, "Unsqueeze": 1}
    assert unet.nodes == 8
    assert unet.weights["float32"] == CONVOLUTION_WEIGHTS + WIDTH * CHANNELS + 1
    assert found.engines["ort-cpu"]["text_encoder"].weights["float32"] == VOCABULARY * WIDTH
    assert found.engines["cpu"]["unet"].operators["Convolution"] == 1
    assert found.engines["cpu"]["unet"].weights["f32"] >= CONVOLUTION_WEIGHTS
    assert found.passes["cpu"]["unet"] == (FusionCount("fuse-scale", 3, 1),)
    assert found.unrunnable == {}
    assert found.bytes == sum(
        path.stat().st_size for path in bundle.rglob("*") if path.name != "sdc.json" and path.is_file()
    )


def test_bundle_as_text_and_json(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(bundle), "--json", str(tmp_path / "out.json")) == 0
    text = capsys.readouterr().out
    for expected in ("small, fp32, fused", "target cpu", "runs here", "fuse-scale 3 (1 left alone)", "B 1 to 8"):
        assert expected in text
    value = json.loads((tmp_path / "out.json").read_text())
    assert value["engines"]["ort-cpu"]["unet"]["nodes"] == 8
    assert value["passes"]["cpu"]["unet"] == [{"name": "fuse-scale", "matched": 3, "skipped": 1}]
    assert run_command(str(bundle / "sdc.json"), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == {**value, "path": str(bundle)}


def test_engine_file_says_which_bundle_it_lies_in(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(bundle / "vae_decoder/model.onnx")) == 0
    text = capsys.readouterr().out
    assert "latent_sample float32 [B, 4, H, W]" in text
    assert "it is the vae_decoder of target ort-cpu" in text
    assert "1 ConvTranspose" in text


def test_fused_operators_are_counted(tmp_path: Path) -> None:
    """A function of domain sdc, called twice, once inside a branch."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3]))
    calls = [ir.Node("sdc", "Silu", [x], name="a")]
    calls.append(ir.Node("sdc", "Silu", [calls[0].outputs[0]], name="b"))
    calls.append(ir.Node("", "Relu", [calls[1].outputs[0]], name="c"))
    y = calls[-1].outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=calls, opset_imports={"": 23, "sdc": 1}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "fused.onnx")
    found = inspect_engine(tmp_path / "fused.onnx")
    assert found.fused == {"Silu": 2}
    assert found.operators == {"sdc::Silu": 2, "Relu": 1}
    assert "fused   Silu 2" in format_engine(found)


def make_header(size: int, version: tuple[int, int, int, int] = (1, 7, 1, 116), bits: int = 0b10100) -> bytes:
    return b"vtrt" + bytes(4) + struct.pack("<QQ4B4sI", 2, size, *version, b"vtrt", bits)


PROGRAM = b"""header {
  version = 5
descriptors {
  tensor={ alignment=128 const_payload_size=1200 dims={ 1 } name="w" type=half }
  tensor={ alignment=128 const_payload_size=40 dims={ 1 } name="b" type=float }
  tensor={ alignment=128 dims={ 1 } name="x" type=half }
main {
 label bb1:
  shape_call={ name="a" }
  corrltn={ name="node_conv" }
  function={ name=__myl_SiluGnor fqn=z }
  function={ name=__myl_SiluGnor fqn=y }
shape_main {
  add={ name="not counted" }
"""


def write_plan(path: Path, **changes: object) -> Path:
    tail = bytes(7) + PROGRAM + bytes(5)
    path.write_bytes(make_header(36 + len(tail), **changes) + tail)  # type: ignore[arg-type]
    return path


def test_plan_without_gpu_or_tensorrt(tmp_path: Path) -> None:
    found = inspect_plan(write_plan(tmp_path / "x.plan"))
    assert found.properties == {"built with": "TensorRT for RTX 1.7.1.116", "built for": "sm86, sm120"}
    assert found.operators == {"SiluGnor": 2, "corrltn": 1}
    assert found.weights == {"half": 1200, "float": 40}


def test_plan_of_an_unknown_version_tells_less(tmp_path: Path) -> None:
    found = inspect_plan(write_plan(tmp_path / "x.plan", version=(2, 0, 0, 1)))
    assert "can tell" in found.properties["built for"]


def test_real_plan(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = inspect_path(write_whole_bundle(tmp_path / "small", targets=("rtx",)))
    assert isinstance(found, BundleDescription)
    plan = found.engines["rtx"]["unet"]
    assert plan.properties["built for"] == "sm86, sm89, sm120"
    assert plan.properties["built with"].startswith("TensorRT for RTX ")
    assert plan.operators["corrltn"] == 1
    assert "sm86, sm89, sm120" in format_bundle(found)


@pytest.mark.parametrize("capability", ["sm86", "sm121"])
def test_bits_of_real_plans(tmp_path: Path, capability: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert capability in COMPUTE_CAPABILITIES
    bundle = write_whole_bundle(tmp_path / "small", targets=(capability,))
    assert inspect_plan(bundle / f"unet/{capability}.plan").properties["built for"] == capability


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"ONNX" * 20, "begins with b'ONNX'"),
        (b"ptrt" + bytes(60), "full TensorRT"),
        (make_header(4096) + bytes(60), "should have 4,096 bytes, found 96"),
    ],
)
def test_damaged_plans(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.plan"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        inspect_path(path)


def test_damaged_onnx(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "unet", tmp_path / "unet")
    model, weights = tmp_path / "unet/model.onnx", tmp_path / "unet/model.onnx_data"
    assert inspect_engine(model).nodes == 8
    if weights.exists():
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(InputError, match="truncated"):
            inspect_engine(model)
        weights.unlink()
        with pytest.raises(InputError, match="missing"):
            inspect_engine(model)
    model.write_bytes(model.read_bytes()[:-40])
    with pytest.raises(InputError, match="no ONNX model"):
        inspect_engine(model)
    model.write_bytes(b"")
    with pytest.raises(InputError, match="no ONNX model"):
        inspect_engine(model)


def test_damaged_openvino(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "unet", tmp_path / "unet")
    graph, weights = tmp_path / "unet/openvino_model.xml", tmp_path / "unet/openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:10])
    with pytest.raises(InputError, match="no OpenVINO model"):
        inspect_engine(graph)
    graph.write_text(graph.read_text()[:200])
    with pytest.raises(InputError, match="no OpenVINO model"):
        inspect_engine(graph)
    weights.unlink()
    with pytest.raises(InputError, match="missing"):
        inspect_engine(graph)


def test_changed_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    changed = bytearray((copy / "unet/openvino_model.bin").read_bytes())
    changed[0] ^= 1
    (copy / "unet/openvino_model.bin").write_bytes(changed)
    with pytest.raises(BundleError, match=r"openvino_model\.bin has changed"):
        inspect_path(copy)


def test_json_that_cannot_be_written(bundle: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "no/such/folder.json", tmp_path):
        with pytest.raises(InputError, match="cannot write"):
            run_command(str(bundle), "--json", str(path))


def test_what_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        inspect_path(tmp_path / "nothing.onnx")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="unknown ending"):
        inspect_path(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="no bundle"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("every_tensor", [False, True])
def test_tensors_that_cross_are_told_together(bundle: Path, every_tensor: bool) -> None:
    crossing = tuple(TensorSpec(f"prompt.{index}", "float32", ("B", 77, 5)) for index in range(3))
    found = inspect_path(bundle)
    assert isinstance(found, BundleDescription)
    unet = found.manifest.components["unet"]
    unet = replace(unet, inputs=(*unet.inputs, *crossing), dimensions={**unet.dimensions, "B": DimensionRange(1, 2, 8)})
    manifest = replace(found.manifest, components={"unet": unet})
    text = format_bundle(replace(found, manifest=manifest), every_tensor=every_tensor)
    assert ("prompt.1 float32 [B, 77, 5]" in text) == every_tensor
    # 3 tensors of 2 x 77 x 5 numbers of 4 bytes
    assert ("3 tensors prompt.0 to prompt.2 (9.2 kB a picture)" in text) == (not every_tensor)
