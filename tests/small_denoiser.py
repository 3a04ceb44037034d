"""A denoising network of a few nodes in which every layer role occurs once or twice, with odd and distinct sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.passes.base import PassReport, run_passes
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.pipeline import canonical_passes, fusion_passes
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.formats import Format
from sdc.passes.precision.insert_qdq import InsertQdq
from sdc.passes.precision.log_histogram import LogHistogram
from sdc.passes.precision.plan import uniform_plan
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.tensor_statistics import TensorStatistics
from sdc.passes.simplify.inline_functions import InlineFunctions

SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("B", 3, "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", ("B", 5, 7)),
    ),
    (TensorSpec("out_sample", "float32", ("B", 3, "H", "W")),),
    {"B": DimensionRange(1, 2, 4), "H": DimensionRange(4, 5, 8), "W": DimensionRange(4, 7, 8)},
)
"""Interface of the denoiser."""

TEXT = """
<ir_version: 10, opset_import: ["": 23]>
denoiser (float[B, 3, H, W] sample, float[1] timestep, float[B, 5, 7] encoder_hidden_states)
    => (float[B, 3, H, W] out_sample)
<int64[1] one = {1}, int64[2] row = {1, 1}, int64[2] planes = {2, 3}, int64[3] to_tokens = {0, 32, -1},
 int64[2] head = {0, 32}>
{
    first = Conv <pads = [1, 1, 1, 1]> (sample, w_input)

    batch = Shape <start = 0, end = 1> (sample)
    time_shape = Concat <axis = 0> (batch, one)
    time_row = Reshape (timestep, row)
    time = Expand (time_row, time_shape)
    time_1 = Gemm (time, w_time_1)
    time_2 = Sigmoid (time_1)
    time_3 = Gemm <transB = 1> (time_2, w_time_2, b_time_2)
    time_embedding = Unsqueeze (time_3, planes)

    normed_1 = GroupNormalization <num_groups = 2, epsilon = 1e-5> (first, g_1, b_1)
    gate_1 = Sigmoid (normed_1)
    active_1 = Mul (normed_1, gate_1)
    inner_1 = Conv <pads = [1, 1, 1, 1]> (active_1, w_interior_1, b_interior_1)
    inner_2 = Add (inner_1, time_embedding)
    skip = Conv (first, w_shortcut)
    block_1 = Add (inner_2, skip)
    block = Conv <pads = [1, 1, 1, 1]> (block_1, w_interior_5)

    normed_2 = GroupNormalization <num_groups = 3, epsilon = 1e-5> (block, g_2, b_2)
    projected = Conv (normed_2, w_interior_2)
    channels_first = Reshape (projected, to_tokens)
    tokens = Transpose <perm = [0, 2, 1]> (channels_first)
    normed_3 = LayerNormalization <axis = -1> (tokens, g_3, b_3)
    query = MatMul (normed_3, w_interior_3)
    key = MatMul (encoder_hidden_states, w_prompt_1)
    value = MatMul (encoder_hidden_states, w_prompt_2)
    attended = Attention <q_num_heads = 2, kv_num_heads = 2> (query, key, value)
    mixed = MatMul (attended, w_interior_4)
    mixed_biased = Add (mixed, b_interior_4)
    tokens_2 = Add (mixed_biased, tokens)
    channels_first_2 = Transpose <perm = [0, 2, 1]> (tokens_2)
    size = Shape <start = 2> (sample)
    picture_shape = Concat <axis = 0> (head, size)
    picture = Reshape (channels_first_2, picture_shape)
    back = Conv (picture, w_projection_out)
    block_2 = Add (back, block)

    normed_4 = GroupNormalization <num_groups = 3, epsilon = 1e-5> (block_2, g_4, b_4)
    gate_4 = Sigmoid (normed_4)
    active_4 = Mul (normed_4, gate_4)
    out_sample = Conv <pads = [1, 1, 1, 1]> (active_4, w_output)
}
"""

SHAPES = {
    "w_input": (6, 3, 3, 3),
    "w_time_1": (1, 4),
    "w_time_2": (9, 4),
    "b_time_2": (9,),
    "w_interior_1": (9, 6, 3, 3),
    "b_interior_1": (9,),
    "w_shortcut": (9, 6, 1, 1),
    "w_interior_2": (32, 9, 1, 1),
    "w_interior_3": (32, 32),
    "w_prompt_1": (7, 32),
    "w_prompt_2": (7, 32),
    "w_interior_4": (32, 32),
    "b_interior_4": (32,),
    "w_interior_5": (9, 9, 3, 3),
    "w_projection_out": (9, 32, 1, 1),
    "w_output": (3, 9, 3, 3),
    "g_1": (6,),
    "b_1": (6,),
    "g_2": (9,),
    "b_2": (9,),
    "g_3": (32,),
    "b_3": (32,),
    "g_4": (9,),
    "b_4": (9,),
}


def make_denoiser(seed: int = 5) -> ir.Model:
    """The network with seeded weights."""
    random = np.random.default_rng(seed)
    weights = {
        name: random.normal(0, np.prod(shape[1:], initial=4.0) ** -0.5, shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return make_model(TEXT, weights)


def make_fused_denoiser(seed: int = 5) -> ir.Model:
    """The same network with operators of domain `sdc`."""
    model = make_denoiser(seed)
    run_passes([*canonical_passes(), *fusion_passes()], model)
    assert sum(node.domain == "sdc" for node in model.graph) >= 2
    return model


def make_model(text: str, weights: dict[str, np.ndarray]) -> ir.Model:
    """A model from ONNX's textual syntax, with initialisers."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(proto)
    return ir.serde.deserialize_model(proto)


def make_feeds(seed: int = 17) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.normal(size=(2, 3, 5, 7)).astype(np.float32),
        "timestep": np.array([341.0], np.float32),
        "encoder_hidden_states": random.normal(size=(2, 5, 7)).astype(np.float32),
    }


def run_model(model: ir.Model, feeds: dict[str, np.ndarray], fetches: list[str] | None = None) -> list[np.ndarray]:
    """Run on ONNX Runtime as the graph says, without its optimisations."""
    flat = model.clone()
    InlineFunctions(fused=True).run(flat)
    proto = ir.to_proto(flat)
    for name in fetches or []:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(fetches, feeds))


def make_table(model: ir.Model, ranges: dict[str, float | tuple[float, float]]) -> CalibrationTable:
    """A table for `model` with ranges of the test's choice: a magnitude or (lowest, highest) each."""
    pairs = {name: limit if isinstance(limit, tuple) else (-limit, limit) for name, limit in ranges.items()}
    return CalibrationTable(
        graph_digest=digest_from_model(model),
        prompts=("a prompt",),
        seed=3,
        sampler="ddim",
        steps=1,
        guidance_scale=1.0,
        latent_size=(5, 7),
        timesteps=(341.0,),
        tensors={
            name: TensorStatistics((low,), (high,), (low,), (high,), (0.0,), LogHistogram())
            for name, (low, high) in pairs.items()
        },
    )


def measure_table(model: ir.Model, feeds: dict[str, np.ndarray]) -> CalibrationTable:
    """The table of one run of the network."""
    layers = {layer.activation.name or "": layer for layer in find_layers(model)[0]}
    inner = sorted(name for name in layers if name not in feeds)
    fetched = run_model(model, feeds, inner) if inner else []
    values = dict(zip(inner, fetched, strict=True)) | feeds
    tensors = {name: _statistics(values[name], layer.spatial_axes) for name, layer in sorted(layers.items())}
    return replace(make_table(model, {}), tensors=tensors)


def _statistics(value: np.ndarray, spatial_axes: int) -> TensorStatistics:
    axis = value.ndim - 1 - spatial_axes
    rows = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
    histogram = LogHistogram()
    histogram.add(value)
    return TensorStatistics(
        minima=(float(value.min()),),
        maxima=(float(value.max()),),
        channel_minima=tuple(rows.min(axis=0).tolist()),
        channel_maxima=tuple(rows.max(axis=0).tolist()),
        channel_means=tuple(rows.mean(axis=0, dtype=np.float32).tolist()),
        histogram=histogram,
    )


def quantise_everything(model: ir.Model, table: CalibrationTable, **options: Any) -> PassReport:
    """Insert Q/DQ in int8 at every layer, whatever its role."""
    plan = uniform_plan(model, Format.INT8, kept=frozenset())
    return InsertQdq(table, plan, **options).run(model)
