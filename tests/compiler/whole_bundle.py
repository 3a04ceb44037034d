"""Real bundles of four tiny networks, written with the project's own builders in a fraction of a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.component import Component
from sdc.compiler.memory.graph_json import MEMORY_REPORT
from sdc.engines.manifest import (
    EngineEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    PipelineSettings,
    TargetEntry,
)
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import TARGETS

TOKENS, WIDTH, CHANNELS, VOCABULARY = 77, 6, 4, 300
SIDE = DimensionRange(4, 8, 16, 2)
BATCH = DimensionRange(1, 2, 8)


def write_whole_bundle(
    folder: Path,
    *,
    noise: float = 0.0,
    seed: int = 1,
    model: str = "small",
    targets: tuple[str, ...] = ("ort-cpu",),
    fused: bool = True,
    idle_channels: int = 0,
) -> Path:
    """Write a bundle whose weights depend on `seed`, the UNet's disturbed by `noise`, with one more node if unfused.

    With `idle_channels` the UNet computes so many more channels of its first convolution, which count for nothing: it
    draws the same pictures in more time.
    """
    components = {each.spec.name: each for each in _components(seed, noise, fused=fused, idle_channels=idle_channels)}
    files: dict[str, FileEntry] = {}
    entries = {}
    for name in targets:
        target = TARGETS[name]
        engines = {}
        for component in components.values():
            built = build_engine(component, target, folder / component.spec.name)
            engines[component.spec.name] = EngineEntry(
                tuple(f"{component.spec.name}/{file}" for file in built.files), built.options
            )
        entries[name] = TargetEntry(target.backend, built.built_with, target.compute_capabilities, engines)
    _write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    (folder / "reports").mkdir()
    reports = {"fusion": [{"name": "fuse-scale", "matched": 3, "skipped": [{"site": "x", "reason": "y"}]}]}
    (folder / "reports/passes.json").write_text(json.dumps({"unet": dict.fromkeys(targets, reports)}))
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    manifest = Manifest(
        schema=1,
        sdc_version="0.1.0",
        model=ModelEntry(model, "made by a test", (), "trained"),
        precision="fp32",
        fused=fused,
        components={name: component.spec for name, component in components.items()},
        pipeline=PipelineSettings(0.5, 0.0, 4, CHANNELS, 32, 32, TOKENS, None),
        targets=entries,
        files=files,
    )
    (folder / "sdc.json").write_text(json.dumps(manifest.to_json()))
    return folder


def carry_memory_report(bundle: Path, report: object) -> None:
    """Write what `sdc plan` reads into a bundle, and its digest into the manifest."""
    content = json.dumps(report).encode()
    (bundle / MEMORY_REPORT).write_bytes(content)
    manifest = json.loads((bundle / "sdc.json").read_text())
    manifest["files"][MEMORY_REPORT] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "sdc.json").write_text(json.dumps(manifest))


def _components(seed: int, noise: float, *, fused: bool, idle_channels: int) -> list[Component]:
    random, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    def disturbed(weight: np.ndarray) -> np.ndarray:
        return weight + (noise * other.standard_normal(weight.shape)).astype(np.float32) * weight.std()

    embedding = draw(VOCABULARY, WIDTH)
    convolution, projection = disturbed(draw(CHANNELS, CHANNELS, 3, 3, scale=0.2)), draw(WIDTH, CHANNELS)
    decoder, encoder = draw(CHANNELS, 3, 4, 4, scale=0.15), draw(2 * CHANNELS, 3, 4, 4, scale=0.2)
    return [
        _text_encoder(embedding),
        _unet(convolution, projection, fused=fused, idle_channels=idle_channels),
        _convolution("vae_decoder", "latent_sample", "sample", "ConvTranspose", decoder),
        _convolution("vae_encoder", "sample", "latent_parameters", "Conv", encoder),
    ]


class _Graph:
    """Collects nodes and weights of a small graph."""

    def __init__(self, spec: ComponentSpec) -> None:
        self.spec = spec
        self.inputs = {each.name: self._value(each) for each in spec.inputs}
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    @staticmethod
    def _value(tensor: TensorSpec) -> ir.Value:
        dtype = ir.DataType.from_numpy(np.dtype(tensor.dtype))
        return ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape))

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        self.weights.append(
            ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
        )
        return self.weights[-1]

    def add(self, operator: str, *inputs: ir.Value, output: str | None = None, **attributes: object) -> ir.Value:
        converted = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        node = ir.Node("", operator, inputs, converted, name=f"{operator}_{len(self.nodes)}")
        node.outputs[0].name = output or f"value_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def finish(self, *outputs: ir.Value) -> Component:
        for value, tensor in zip(outputs, self.spec.outputs, strict=True):
            declared = self._value(tensor)
            value.name, value.type, value.shape = tensor.name, declared.type, declared.shape
        graph = ir.Graph(
            list(self.inputs.values()),
            list(outputs),
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 23},
            name=self.spec.name,
        )
        return Component(self.spec, ir.Model(graph, ir_version=10))


def _text_encoder(embedding: np.ndarray) -> Component:
    spec = ComponentSpec(
        "text_encoder",
        (TensorSpec("input_ids", "int64", ("B", TOKENS)),),
        (
            TensorSpec("last_hidden_state", "float32", ("B", TOKENS, WIDTH)),
            TensorSpec("pooler_output", "float32", ("B", WIDTH)),
        ),
        {"B": BATCH},
    )
    graph = _Graph(spec)
    states = graph.add("Gather", graph.weight("embedding", embedding), graph.inputs["input_ids"])
    pooled = graph.add("ReduceMean", states, graph.weight("axes", np.array([1])), keepdims=0)
    return graph.finish(states, pooled)


def _unet(convolution: np.ndarray, projection: np.ndarray, *, fused: bool, idle_channels: int) -> Component:
    spec = ComponentSpec(
        "unet",
        (
            TensorSpec("sample", "float32", ("B", CHANNELS, "H", "W")),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("encoder_hidden_states", "float32", ("B", TOKENS, WIDTH)),
        ),
        (TensorSpec("out_sample", "float32", ("B", CHANNELS, "H", "W")),),
        {"B": BATCH, "H": SIDE, "W": SIDE},
    )
    graph = _Graph(spec)
    text = graph.add(
        "ReduceMean", graph.inputs["encoder_hidden_states"], graph.weight("axes", np.array([1])), keepdims=0
    )
    condition = graph.add("MatMul", text, graph.weight("projection", projection))
    condition = graph.add("Unsqueeze", condition, graph.weight("sides", np.array([2, 3])))
    hidden = graph.add("Conv", graph.inputs["sample"], graph.weight("convolution", convolution), pads=[1, 1, 1, 1])
    time = graph.add("Mul", graph.inputs["timestep"], graph.weight("thousandth", np.array([1e-3], np.float32)))
    hidden = graph.add("Add", graph.add("Add", hidden, condition), time)
    hidden = graph.add("Tanh", hidden)
    if idle_channels:
        wide = graph.weight("wide", np.resize(convolution, (idle_channels, CHANNELS, 3, 3)))
        none = graph.weight("none", np.zeros((CHANNELS, idle_channels, 3, 3), np.float32))
        idle = graph.add("Conv", graph.inputs["sample"], wide, pads=[1, 1, 1, 1])
        hidden = graph.add("Add", hidden, graph.add("Conv", idle, none, pads=[1, 1, 1, 1]))
    if not fused:
        hidden = graph.add("Mul", hidden, graph.weight("one", np.array([1], np.float32)))
    return graph.finish(hidden)


def _convolution(name: str, feed: str, result: str, operator: str, weight: np.ndarray) -> Component:
    small, large = ("B", CHANNELS, "H", "W"), ("B", 3, "H_px", "W_px")
    side_px = DimensionRange(*(4 * size for size in (SIDE.minimum, SIDE.optimum, SIDE.maximum, SIDE.multiple)))
    decodes = operator == "ConvTranspose"
    spec = ComponentSpec(
        name,
        (TensorSpec(feed, "float32", small if decodes else large),),
        (TensorSpec(result, "float32", large if decodes else ("B", 2 * CHANNELS, "H", "W")),),
        {"B": BATCH, "H": SIDE, "W": SIDE, "H_px": side_px, "W_px": side_px},
    )
    graph = _Graph(spec)
    return graph.finish(graph.add(operator, graph.inputs[feed], graph.weight("weight", weight), strides=[4, 4]))


def _write_tokenizer(folder: Path) -> None:
    """A vocabulary of single letters in the files of CLIP's tokenizer."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
