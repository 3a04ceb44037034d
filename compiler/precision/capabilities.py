"""Which precisions each target runs, in one place.

Found by building graphs of one Conv or MatMul for every target, and by running them where the machine can, with
OpenVINO 2026.4, ONNX Runtime 1.31 and TensorRT for RTX 1.7 (tests/passes/test_weight_formats.py keeps watch):

- OpenVINO keeps weights of a MatMul in 8 and 4 bits in memory; those of a Conv it expands to its own arithmetic's type
  when it loads the engine, so that "w8" and "w4" make files smaller, not memory. Eight-bit floats it rounds to and
  computes in floating point: slower than fp16, and of no use.
- ONNX Runtime keeps weights of a MatMul in 8 and 4 bits (MatMulNBits); those of a Conv too, but it expands them anew in
  every run. It has no bfloat16 kernels for CPUs, and its optimiser breaks eight-bit floats ("FusedMatMul ... invalid").
- On a GPU, ONNX Runtime dequantises both operands of int8 products at each run: nothing is gained over fp16.
- TensorRT has no float32 matrix products for sm75, 4-bit weights and bfloat16 from sm80, eight-bit floats from sm89.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdc.engines.errors import TargetError
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX, Target
from sdc.passes.precision.formats import Format

_ALL = frozenset(Format)

_BACKENDS = {
    OPENVINO: _ALL - {Format.FP8},
    ONNXRUNTIME: _ALL - {Format.FP8, Format.BF16},
    ONNXRUNTIME_CUDA: frozenset({Format.FP32, Format.FP16}),
    TENSORRT_RTX: _ALL,
}

_CAPABILITIES = {
    "sm75": frozenset({Format.FP16, Format.INT8, Format.W8}),
    "sm80": _ALL - {Format.FP8},
    "sm86": _ALL - {Format.FP8},
    "sm89": _ALL,
    "sm120": _ALL,
    "sm121": _ALL,
}

_NEAREST = {
    Format.FP8: (Format.INT8, Format.FP16),
    Format.INT8: (Format.FP16,),
    Format.W8: (Format.FP16,),
    Format.W4: (Format.W8, Format.FP16),
    Format.BF16: (Format.FP16, Format.FP32),
    Format.FP32: (Format.FP16,),
}


def runnable_formats(target: Target) -> frozenset[Format]:
    """What every GPU, or the library, of a target runs."""
    found = _BACKENDS[target.backend]
    for capability in target.compute_capabilities:
        found &= _CAPABILITIES[capability]
    return found


def in_float32(target: Target) -> bool:
    """Whether what a plan leaves in 16 bits is computed in float32; ONNX Runtime has no such kernels for CPUs."""
    return target.backend == ONNXRUNTIME


def runs_here(target: Target) -> bool:
    """Whether its engines run on the machine that builds them, whichever it is."""
    return target.backend in (OPENVINO, ONNXRUNTIME)


def check_formats(target: Target, formats: Iterable[Format]) -> None:
    """Pass only if the target runs all of them.

    Raises:
        TargetError: it does not; the error names the nearest that it runs, and the targets that would.
    """
    runs = runnable_formats(target)
    for wanted in sorted(set(formats) - runs):
        nearest = next((each for each in _NEAREST.get(wanted, ()) if each in runs), None)
        ours = (name for name in target.compute_capabilities if wanted in _CAPABILITIES[name])
        capable = "+".join(ours)
        hints = [
            f"the nearest that it runs is {nearest}" if nearest else "",
            f"{capable} would run it" if capable and target.backend == TENSORRT_RTX else "",
        ]
        raise TargetError(
            f"the target {target.name!r} does not run {wanted}", hint=", and ".join(filter(None, hints)) or None
        )
