"""Which CPUs multiply bytes without saturating."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdc.engines.processor import multiplies_bytes_exactly

onnxruntime = pytest.importorskip("onnxruntime")


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


def test_the_largest_bytes_do_not_saturate_in_a_session(tmp_path: Path) -> None:
    """On a CPU with VNNI this holds with or without the option that the session sets."""
    import onnx

    from sdc.engines.sessions.onnxruntime import session_options

    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (uint8[4, 64] a) => (float[4, 8] y)
        <float s = {1}, uint8 z = {0}> { y = com.microsoft.MatMulIntegerToFloat (a, w, s, s, z) }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "w"))
    onnx.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", session_options(1), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"a": np.full((4, 64), 255, np.uint8)})
    np.testing.assert_array_equal(found, 64 * 255 * 127)
