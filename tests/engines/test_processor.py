"""Which CPUs multiply bytes without saturating."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.engines.errors import TargetError
from sdc.engines.processor import exact_weight_bits, multiplies_bytes_exactly
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import TARGETS

LAYER = """<ir_version: 10, opset_import: ["": 23]> g (float[4, 64] x) => (float[4, 8] y)
    <float s = {1}, uint8 z = {0}> {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        v = DequantizeLinear (w, s)
        y = MatMul (d, v) }"""


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "fpu avx2 fma", False),
        ("AMD64", "fpu avx2 avx512f avx512bw", False),
        ("x86_64", "fpu avx2 avx_vnni", True),
        ("x86_64", "avx512f avx512_vnni", True),
        ("aarch64", None, True),
        ("x86_64", None, False),
        ("AMD64", "", False),
    ],
)
def test_vnni_decides_on_x86(machine: str, flags: str | None, exact: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\n\nprocessor\t: 1\n", encoding="utf-8")
    assert multiplies_bytes_exactly(machine, cpuinfo) is exact


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_the_largest_bytes_do_not_saturate_in_a_session(target: str, bits: int, tmp_path: Path) -> None:
    """Where the processor's own products of 8 bits would, OpenVINO computes in float32 and ONNX Runtime refuses."""
    largest = 2 ** (bits - 1) - 1
    proto = onnx.parser.parse_model(LAYER)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((64, 8), largest, np.int8), "w"))
    tensors = (TensorSpec("x", "float32", (4, 64)),), (TensorSpec("y", "float32", (4, 8)),)
    spec = ComponentSpec("unet", *tensors, {})
    built = build_engine(Component(spec, ir.from_proto(proto)), TARGETS[target], tmp_path)
    assert built.options["weight_bits"] == bits
    files = tuple(tmp_path / name for name in built.files)
    source = EngineSource(spec, TARGETS[target].backend, files, built.options)
    if bits > exact_weight_bits() and target == "ort-cpu":
        with pytest.raises(TargetError, match="8 bits saturate"):
            open_session(source)
        return
    with open_session(source) as session:
        found = session.run({"x": np.full((4, 64), 255, np.float32)})["y"]
    np.testing.assert_array_equal(found, 64 * 255 * largest)
