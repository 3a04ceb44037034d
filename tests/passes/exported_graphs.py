"""Networks as exporters wrote them, without weights: `exports/EXPORTER/COMPONENT.onnx`.

They are the small model's four networks and the UNets of `reduced_networks`, by torch's exporters: dynamo at opset 23,
with the passes' own names and symbols; dynamo at opset 18 and TorchScript at 14 and 17, as anybody would export them.

A checked-in graph costs a test nothing, and the counts that are asserted for it are those of one exporter's version.
The weights of a stored graph are among its inputs; `load_graph` draws them anew, norms and biases too, so that a pass
that confuses two of them is seen. `python tests/passes/exported_graphs.py EXPORT.onnx EXPORTER COMPONENT` stores an
export, and `scripts/exporter_matrix.py --keep FOLDER` makes exports.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

FOLDER = Path(__file__).parent / "exports"
INPUTS: dict[str, dict[str, tuple[int | str, ...]]] = {
    "unet": {"sample": ("B", 4, "H", "W"), "timestep": (1,), "encoder_hidden_states": ("B", 77, 64)},
    "vae_decoder": {"latent_sample": ("B", 4, "H", "W")},
    "vae_encoder": {"sample": ("B", 3, "4H", "4W")},
    "text_encoder": {"input_ids": ("B", 77)},
}
REDUCED_INPUTS: dict[str, dict[str, tuple[int | str, ...]]] = {
    "sd2_unet": {"sample": ("B", 4, "H", "W"), "timestep": (1,), "encoder_hidden_states": ("B", 77, 96)},
    "sdxl_unet": {
        "sample": ("B", 4, "H", "W"),
        "timestep": (1,),
        "encoder_hidden_states": ("B", 77, 80),
        "text_embeds": ("B", 40),
        "time_ids": ("B", 6),
    },
}
DYNAMO = "dynamo-23"
FOREIGN = (
    *(
        (exporter, component)
        for exporter in ("torchscript-17", "dynamo-18")
        for component in (*INPUTS, *REDUCED_INPUTS)
    ),
    ("torchscript-14", "text_encoder"),
)
"""Exporters beside `DYNAMO`, and what is stored of them."""

_KEPT_ELEMENTS = 32
"""Smaller constants are part of the graph: shapes, scales, the sinusoid's 32 frequencies."""


def load_graph(component: str, seed: int = 3, *, exporter: str = DYNAMO) -> ir.Model:
    """The network with seeded weights."""
    model = ir.load(FOLDER / exporter / f"{component}.onnx")
    generator = np.random.default_rng(seed)
    names = (INPUTS | REDUCED_INPUTS)[component]
    for value in [each for each in model.graph.inputs if each.name not in names]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(_draw(value, generator), name=value.name)
        model.graph.register_initializer(value)
    return model


def feed(component: str, *, batch: int = 3, height: int = 8, width: int = 12, seed: int = 5) -> dict[str, np.ndarray]:
    """Seeded inputs; `height` and `width` are those of the latents."""
    generator = np.random.default_rng(seed)
    sizes = {"B": batch, "H": height, "W": width, "4H": 4 * height, "4W": 4 * width}
    if component == "text_encoder":
        return {"input_ids": generator.integers(0, 600, (batch, 77))}
    feeds = {
        name: generator.standard_normal(
            tuple(sizes[size] if isinstance(size, str) else size for size in shape), dtype=np.float32
        )
        for name, shape in (INPUTS | REDUCED_INPUTS)[component].items()
    }
    return feeds | ({"timestep": np.array([873.0], np.float32)} if "timestep" in feeds else {})


def store_graph(model: ir.Model, path: Path) -> None:
    """Write a graph without its weights: every reader of a weight gets an input of its own."""
    ClearMetadataAndDocStringPass()(model)
    weights = [
        value
        for value in model.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and np.prod(value.shape) > _KEPT_ELEMENTS
    ]
    for weight in weights:
        # Tensors that were equal by chance (fresh norms) are stored once by the exporter: part them again.
        for count, (node, index) in enumerate(list(weight.uses())):
            value = ir.Value(name=f"{weight.name}.{count}", shape=weight.shape, type=weight.type)
            node.replace_input_with(index, value)
            model.graph.inputs.append(value)
        del model.graph.initializers[weight.name or ""]
    ir.save(ir.external_data.load_to_model(model), path)


def _draw(value: ir.Value, generator: np.random.Generator) -> np.ndarray:
    shape = tuple(int(size) for size in value.shape or ())
    ((node, index),) = value.uses()
    per_channel = len(shape) in (2, 3) and set(shape[1:]) == {1}
    if (node.op_type.endswith("Normalization") and index == 1) or (node.op_type == "Mul" and per_channel):
        return 1 + generator.standard_normal(shape, dtype=np.float32) / 10
    # Weights of Conv and Gemm are [out, in, ...], those of MatMul [in, out].
    fan_in = 100 if len(shape) == 1 else shape[0] if node.op_type == "MatMul" else int(np.prod(shape[1:]))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(fan_in**-0.5)


def _shorten_names(graph: ir.Graph) -> None:
    """Names of inputs and outputs stay: no pass looks at the others, and they are half of a file."""
    for count, node in enumerate(graph):
        node.name = f"n{count}"
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"v{count}_{index}"
    for count, value in enumerate(list(graph.initializers.values())):
        value.name = f"c{count}"


if __name__ == "__main__":
    _export = ir.load(sys.argv[1])
    _shorten_names(_export.graph)
    store_graph(_export, FOLDER / sys.argv[2] / f"{sys.argv[3]}.onnx")
