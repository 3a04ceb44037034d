"""The order of all graph passes. It is written down here and nowhere else.

canonical_passes   →  one spelling for everything, nothing superfluous
fusion_passes      →  operators of domain `sdc`                               (left out by --no-fuse)
low_rank_passes    →  two layers for a weight of low rank         (where a checkpoint says there are any, or on demand)
precision_passes   →  Q/DQ pairs, convolutions that are cheaper at another resolution, 16-bit floats
lowering_passes    →  standard operators in the arrangement that one backend fuses best
"""

from __future__ import annotations

import onnx_ir as ir

from sdc.engines.errors import InputError
from sdc.passes.base import Pass
from sdc.passes.fusion.fuse_add_group_norm import FuseAddGroupNorm
from sdc.passes.fusion.fuse_add_group_norm_silu import FuseAddGroupNormSilu
from sdc.passes.fusion.fuse_add_layer_norm import FuseAddLayerNorm
from sdc.passes.fusion.fuse_attention import FuseAttention
from sdc.passes.fusion.fuse_bias_add import FuseBiasAdd
from sdc.passes.fusion.fuse_bias_geglu import FuseBiasGeGlu
from sdc.passes.fusion.fuse_concat_group_norm_silu import FuseConcatGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu import FuseGroupNormSilu
from sdc.passes.fusion.fuse_group_norm_silu_add import FuseGroupNormSiluAdd
from sdc.passes.fusion.fuse_tokens import FuseTokens
from sdc.passes.fusion.unflatten_group_norm import UnflattenGroupNorm
from sdc.passes.lowering.decompose_attention import DecomposeAttention
from sdc.passes.lowering.guard_quantised_bias import GuardQuantisedBias
from sdc.passes.lowering.lower_bias_sums import LowerBiasSums
from sdc.passes.lowering.lower_conv_to_bytes import LowerConvToBytes
from sdc.passes.lowering.lower_group_norm import LowerGroupNorm
from sdc.passes.lowering.lower_images_to_nhwc import LowerImagesToNhwc
from sdc.passes.lowering.lower_multi_head_attention import ORT_DOMAIN, LowerMultiHeadAttention
from sdc.passes.lowering.lower_quantised_conv import LowerQuantisedConv
from sdc.passes.lowering.lower_to_contrib import LowerToContrib
from sdc.passes.lowering.merge_projections import MergeProjections
from sdc.passes.lowering.move_conv_bias import MoveConvBias
from sdc.passes.lowering.narrow_inputs import NarrowInputs
from sdc.passes.lowering.shift_qdq_to_uint8 import ShiftQdqToUint8
from sdc.passes.lowering.split_geglu import SplitGeGlu
from sdc.passes.lowering.widen_fp16 import WidenFp16
from sdc.passes.precision.cast_bf16 import CastBf16
from sdc.passes.precision.cast_fp16 import CastFp16
from sdc.passes.precision.formats import FLOATING, Format
from sdc.passes.precision.upsample_by_phases import UpsampleByPhases
from sdc.passes.raising.raise_attention import RaiseAttention
from sdc.passes.raising.raise_gelu import RaiseGelu
from sdc.passes.raising.raise_group_norm import RaiseGroupNorm
from sdc.passes.raising.raise_layer_norm import RaiseLayerNorm
from sdc.passes.raising.raise_quick_gelu import RaiseQuickGelu
from sdc.passes.raising.raise_silu import RaiseSilu
from sdc.passes.raising.raise_split import RaiseSplit
from sdc.passes.shapes.infer_shapes import InferShapes
from sdc.passes.shapes.merge_shapes import MergeShapes
from sdc.passes.shapes.resolve_shapes import ResolveShapes
from sdc.passes.simplify.cancel_no_ops import CancelNoOps
from sdc.passes.simplify.check_operators import CheckOperators
from sdc.passes.simplify.convert_opset import ConvertOpset
from sdc.passes.simplify.drop_neutral import DropNeutral
from sdc.passes.simplify.factorise_weights import LEAST_ENERGY_LOST, FactoriseWeights
from sdc.passes.simplify.fix_names import FixNames
from sdc.passes.simplify.fold_constants import FoldConstants
from sdc.passes.simplify.inline_functions import InlineFunctions
from sdc.passes.simplify.lift_constants import LiftConstants
from sdc.passes.simplify.merge_duplicates import MergeDuplicates
from sdc.passes.simplify.omit_outputs import OmitOutputs
from sdc.passes.simplify.order_operands import OrderOperands
from sdc.passes.simplify.remove_unused import RemoveUnused

PRECISIONS = tuple(each.value for each in Format)
MIXED = "mixed"
"""What a plan with several precisions is called where the name of one is expected."""
BACKENDS = ("openvino", "onnxruntime", "tensorrt_rtx")
ORT_CUDA = "onnxruntime_cuda"
"""ONNX Runtime with its CUDA provider; apart, because its operators have no kernels for CPUs."""

_UPSAMPLES_BY_PHASES = frozenset({"openvino"})
"""Backends that are faster with four small convolutions and their interleaving than with one of a doubled image.

Source: OpenVINO 2026.4 in bfloat16 with AMX: the convolutions of SD 1.5's VAE decoder take 0.40 to 0.50 of the time.
The others were not measured.
"""

_SUMS_IN_FLOAT32 = frozenset({("openvino", "text_encoder")})
"""Backends and networks whose sums over all layers stay in float32 beside products in bfloat16.

Source: SD 1.5's with OpenVINO 2026.4: error 0.0068 in place of 0.0111, in the same time. The others were not measured.
"""

_TENSORRT_HEAD_SIZES = frozenset({16, 32, 40, 64, 80, 128, 160, 256, 512})
"""Source: plans built with TensorRT-RTX 1.7 for every capability; other sizes and float32 have no fused kernel."""

_CUDA_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})

_OPENVINO_NORM_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_TENSORRT_DTYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_WITH_GROUP_NORM = frozenset({"unet", "vae_decoder", "vae_encoder"})
_WITH_ATTENTION = frozenset({"unet", "vae_decoder", "vae_encoder", "text_encoder"})


def canonical_passes() -> tuple[Pass, ...]:
    """An exporter's graph → the canonical graph: one spelling for everything, nothing superfluous."""
    return (
        InlineFunctions(),
        LiftConstants(),
        ConvertOpset(),
        FoldConstants(),
        LiftConstants(),
        ResolveShapes(),
        FoldConstants(),
        LiftConstants(),
        CancelNoOps(),
        DropNeutral(),
        OrderOperands(),
        RaiseSplit(),
        RaiseGroupNorm(),
        RaiseLayerNorm(),
        RaiseGelu(),
        RaiseQuickGelu(),
        RaiseSilu(),
        RaiseAttention(),
        RemoveUnused(),
        CancelNoOps(),
        LiftConstants(),
        ResolveShapes(),
        MergeDuplicates(),
        RemoveUnused(),
        FixNames(),
    )


def fusion_passes(component: str | None = None) -> tuple[Pass, ...]:
    """The canonical graph → the fused graph.

    Args:
        component: name of the network. A fusion that finds nothing in a network that is known to hold its sites
            raises PassError; without a name nothing is known.
    """
    return (
        FuseGroupNormSilu(required=component in _WITH_GROUP_NORM),
        FuseAddGroupNormSilu(),
        FuseConcatGroupNormSilu(),
        FuseGroupNormSiluAdd(),
        UnflattenGroupNorm(),
        FuseAddGroupNorm(),
        FuseAttention(required=component in _WITH_ATTENTION),
        FuseAddLayerNorm(),
        FuseBiasGeGlu(),
        FuseBiasAdd(),
        FuseTokens(),
        RemoveUnused(),
        FixNames(),
    )


def low_rank_passes(energy: float | None = None) -> tuple[Pass, ...]:
    """The canonical or fused graph → the same graph with two layers for each weight of low rank.

    Args:
        energy: share of their squared singular values that weights keep, where the rank that keeps it saves
            multiply-adds; None changes nothing but weights that have a low rank.

    Raises:
        InputError: the energy is not between 0 and 1, or so near to 1 that only rounding is beyond it.
    """
    if energy is not None and not LEAST_ENERGY_LOST <= 1 - energy < 1:
        raise InputError(
            f"the energy that weights keep must be between 0 and 1, found {energy!r}",
            hint=f"give for example 0.95, or at most 1 - {LEAST_ENERGY_LOST:g}",
        )
    return (FactoriseWeights(energy=energy), RemoveUnused(), FixNames())


def precision_passes(
    precision: str,
    *,
    quantise: tuple[Pass, ...] = (),
    correct: tuple[Pass, ...] = (),
    remainder: str = "fp16",
    float32: frozenset[str] = frozenset(),
    only: frozenset[str] | None = None,
    backend: str | None = None,
    component: str | None = None,
) -> tuple[Pass, ...]:
    """The canonical or fused graph → the same graph in a precision.

    Args:
        precision: one of `PRECISIONS`, or `MIXED`.
        quantise: passes that put Q/DQ into the float32 graph; with quantised precisions only.
        correct: passes that make up for what rounding did, once the integers are final.
        remainder: "fp32", "fp16" or "bf16", for what a quantised or mixed graph leaves in floating point.
        float32: nodes that stay in float32, by their first output's name; likewise `only`: the only ones that do not.
        backend: what the graph will be lowered for; None leaves out what only some of them are better with.
        component: name of the network; None for any.

    Raises:
        InputError: an unknown precision, or `quantise` and `precision` contradict each other.
    """
    if precision not in (*PRECISIONS, MIXED) or remainder not in FLOATING:
        raise InputError(
            f"unknown precision {precision!r} with remainder {remainder!r}",
            hint=f"choose one of {', '.join(PRECISIONS)}",
        )
    if precision != MIXED and bool(quantise) != (precision not in FLOATING):
        raise InputError(
            f"precision {precision!r} with {len(quantise)} quantising passes",
            hint="quantised precisions need a quantising pass, others take none",
        )
    floating = precision if precision in FLOATING else remainder
    casts: dict[str, tuple[Pass, ...]] = {
        Format.FP16: (CastFp16(float32=float32, only=only),),
        Format.BF16: (CastBf16(float32=float32, only=only, products=(backend, component) in _SUMS_IN_FLOAT32),),
    }
    kept = float32 | (only or frozenset())
    phases = (UpsampleByPhases(kept),) if backend in _UPSAMPLES_BY_PHASES else ()
    return (*quantise, *phases, *correct, *casts.get(floating, ()), RemoveUnused(), FixNames())


def lowering_passes(backend: str) -> tuple[Pass, ...]:
    """A graph of any precision, fused or not → operators that `backend` reads.

    Args:
        backend: one of `BACKENDS`, or `ORT_CUDA`.

    Raises:
        InputError: an unknown backend.
    """
    if backend not in (*BACKENDS, ORT_CUDA):
        raise InputError(f"unknown backend {backend!r}", hint=f"choose one of {', '.join(BACKENDS)}")
    before, after, domains = _arrangement(backend)
    return (
        *before,
        InlineFunctions(fused=True),
        LiftConstants(),
        FoldConstants(),
        LiftConstants(),
        InferShapes(),
        *after,
        MergeShapes(),
        CancelNoOps(),
        MergeDuplicates(),
        RemoveUnused(),
        FixNames(),
        OmitOutputs(domains - {""}),
        CheckOperators(domains),
    )


def _arrangement(backend: str) -> tuple[tuple[Pass, ...], tuple[Pass, ...], frozenset[str]]:
    """Passes before and after the fused operators are inlined, and the operator domains that the backend reads."""
    standard = frozenset({""})
    if backend == "onnxruntime":
        before = (MergeProjections(), WidenFp16(), CancelNoOps(), LowerMultiHeadAttention(), LowerBiasSums())
        return (
            before,
            (LowerGroupNorm(), ShiftQdqToUint8(), LowerConvToBytes(), LowerQuantisedConv()),
            standard | {ORT_DOMAIN},
        )
    if backend == ORT_CUDA:
        fused = (LowerMultiHeadAttention(_CUDA_DTYPES, causal=True), LowerToContrib(), LowerImagesToNhwc())
        return fused, (RemoveUnused(), MoveConvBias(), NarrowInputs()), standard | {ORT_DOMAIN}
    if backend == "tensorrt_rtx":
        return (), (DecomposeAttention(_TENSORRT_DTYPES, _TENSORRT_HEAD_SIZES),), standard
    return (SplitGeGlu(),), (LowerGroupNorm(_OPENVINO_NORM_DTYPES, exact=True), GuardQuantisedBias()), standard
