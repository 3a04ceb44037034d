"""Torch modules to graphs: each component is exported by torch's dynamo exporter and compared with its module."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import OnnxExporterError
from transformers import AttentionInterface, CLIPTextModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdc.compiler.build.built import save_onnx
from sdc.compiler.interfaces import component_spec
from sdc.compiler.load import Checkpoint
from sdc.compiler.tidy_export import tidy_export
from sdc.engines.errors import ExportError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

log = logging.getLogger(__name__)

OPSET = 23
"""The first opset with `Attention`; the exporter also keeps `GroupNormalization` and `Gelu` whole."""

CAUSAL_ATTENTION = "sdc_causal"
SEED = 7411
RELATIVE_TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest output value. Both sides compute in float32: a layer that sums
10,000 products is off by about 1e-6, and a hundred such layers stay well below this bound, while a wrong operator,
constant or weight does not."""

Arrays = dict[str, np.ndarray]


def export_component(checkpoint: Checkpoint, name: str, configs: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    """Export one component and compare the graph with its torch module, which is freed before.

    Args:
        checkpoint: gives the module.
        name: one of ``COMPONENTS``.
        configs: full configurations of all networks: see `component_spec`.
        path: of the graph; its weights go beside it, into ``<name>_data``.

    Returns:
        The largest difference to the module, relative to its largest output value.

    Raises:
        ExportError: the module cannot be exported, or the graph computes something else than the module.
    """
    spec = component_spec(name, configs)
    vocabulary = int(configs["text_encoder"]["vocab_size"])
    feeds, expected = _export_module(_traceable(checkpoint, name), spec, path, vocabulary=vocabulary)
    difference = compare_with_reference(path, spec, feeds, expected)
    log.info("%s: largest difference to torch %.1e", name, difference)
    return difference


def _export_module(module: nn.Module, spec: ComponentSpec, path: Path, *, vocabulary: int) -> tuple[Arrays, Arrays]:
    """Write the graph of `module`; returns feeds and what the module makes of them."""
    feeds = example_feeds(spec, small_sizes(spec), vocabulary=vocabulary)
    expected = _run_module(module, spec, feeds)
    traced = example_feeds(spec, _tracing_sizes(spec), vocabulary=vocabulary)
    sizes = {symbol: _torch_dimension(symbol, size) for symbol, size in spec.dimensions.items()}
    try:
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(traced[tensor.name]) for tensor in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(
                {axis: sizes[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
                for tensor in spec.inputs
            ),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    except OnnxExporterError as error:
        raise ExportError(f"torch could not export the {spec.name}: {error}") from error
    assert program is not None
    save_onnx(tidy_export(program, spec), path)
    return feeds, expected


def _run_module(module: nn.Module, spec: ComponentSpec, feeds: Arrays) -> Arrays:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = {tensor.name: output.numpy().copy() for tensor, output in zip(spec.outputs, outputs, strict=True)}
    for name, value in expected.items():
        if not np.isfinite(value).all():
            raise ExportError(
                f"the {spec.name} itself gives NaN or infinity in {name}, in float32 and before any compilation",
                hint="its weights are damaged, or a LoRA is too strong",
            )
    return expected


def compare_with_reference(path: Path, spec: ComponentSpec, feeds: Arrays, expected: Arrays) -> float:
    """Run an exported graph on ONNX Runtime, without its optimisations, and compare it with what torch gave.

    Returns:
        The largest difference, relative to the largest expected value of the same output.

    Raises:
        ExportError: it is above `RELATIVE_TOLERANCE`, or the graph cannot be run.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = session.run([tensor.name for tensor in spec.outputs], feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ExportError(f"ONNX Runtime cannot run the exported {spec.name}: {error}") from error
    worst = 0.0
    for tensor, found in zip(spec.outputs, outputs, strict=True):
        reference = expected[tensor.name]
        if found.shape != reference.shape:
            raise ExportError(f"the exported {spec.name} gives {tensor.name} {found.shape}, torch {reference.shape}")
        difference = float(np.abs(found - reference).max() / np.abs(reference).max())
        if not difference <= RELATIVE_TOLERANCE:
            raise ExportError(
                f"the exported {spec.name} differs from its torch module: {tensor.name} by {difference:.1e} of its "
                f"largest value, expected at most {RELATIVE_TOLERANCE:.0e}",
                hint="this is a fault of the export; please report it with the versions of torch and onnxscript",
            )
        worst = max(worst, difference)
    return worst


def example_feeds(spec: ComponentSpec, sizes: Mapping[str, int], *, vocabulary: int) -> Arrays:
    """Seeded inputs of a component.

    Args:
        spec: the interface.
        sizes: of every free dimension.
        vocabulary: number of tokens; the last one ends a text and stands at another place in every row.
    """
    random = np.random.default_rng(SEED)

    def draw(tensor: TensorSpec) -> np.ndarray:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        if tensor.dtype == "int64":
            tokens = random.integers(0, vocabulary - 1, shape)
            for row, ids in enumerate(tokens):
                ids[5 * row + 3 :] = vocabulary - 1
            return tokens
        if tensor.name == "timestep":
            return np.full(shape, 501.0, np.float32)
        return random.standard_normal(shape, dtype=np.float32)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def small_sizes(spec: ComponentSpec) -> dict[str, int]:
    """Sizes for comparing: as small as the network can take, all different, and not those of the tracing."""

    def small(symbol: str, size: DimensionRange) -> int:
        if symbol == "B":
            return min(3, size.maximum)
        return size.multiple * (2 if symbol.startswith("H") else 1)

    return {symbol: small(symbol, size) for symbol, size in spec.dimensions.items()}


def _tracing_sizes(spec: ComponentSpec) -> dict[str, int]:
    """Sizes for tracing, which computes nothing: the largest, height and width apart."""

    def large(symbol: str, size: DimensionRange) -> int:
        return size.maximum - (size.multiple if symbol.startswith("H") else 0)

    return {symbol: large(symbol, size) for symbol, size in spec.dimensions.items()}


def _torch_dimension(symbol: str, size: DimensionRange) -> Dim:
    """The free dimension as torch wants it said: a whole number of times its divisor, where it has one."""
    dimension = Dim(f"{symbol}_count", min=1, max=size.maximum // size.multiple)
    return dimension if size.multiple == 1 else size.multiple * dimension


class _TextEncoder(nn.Module):
    def __init__(self, network: CLIPTextModel) -> None:
        super().__init__()
        # transformers builds an explicit mask while it is traced; a text encoder without padding mask is just causal.
        AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        network.set_attn_implementation(CAUSAL_ATTENTION)
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(input_ids)
        return output.last_hidden_state, output.pooler_output


class _Unet(nn.Module):
    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.network(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return output


class _VaeDecoder(nn.Module):
    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        network.encoder, network.quant_conv = None, None
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.network.decode(latent_sample, return_dict=False)[0]
        return output


class _VaeEncoder(nn.Module):
    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        network.decoder, network.post_quant_conv = None, None
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.network.encoder(sample)
        return moments if self.network.quant_conv is None else self.network.quant_conv(moments)


def _traceable(checkpoint: Checkpoint, name: str) -> nn.Module:
    """The component's network with exactly the inputs and outputs of its interface."""
    if name == "text_encoder":
        return _TextEncoder(checkpoint.text_encoder()).eval()
    if name == "unet":
        return _Unet(checkpoint.unet()).eval()
    return (_VaeDecoder if name == "vae_decoder" else _VaeEncoder)(checkpoint.vae()).eval()
