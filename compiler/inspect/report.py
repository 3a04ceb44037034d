"""Descriptions of bundles and engine files as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from sdc.compiler.inspect.engine_file import EngineFile, TensorInfo
from sdc.compiler.inspect.inspect import BundleDescription
from sdc.compiler.text_table import format_table
from sdc.engines.manifest import TargetEntry
from sdc.engines.preset import Preset, options_text
from sdc.engines.specs import ComponentSpec, TensorSpec
from sdc.engines.targets import Target

OPERATORS_IN_A_LINE = 6
COLUMNS = 5

_CROSSING = {"prompt": "picture", "timestep": "timestep"}
"""What tensors that cross are called before their number, and how often they are made."""


def format_bundle(bundle: BundleDescription, *, every_tensor: bool = False) -> str:
    """What a bundle is, its interface, and the engines of each target.

    Args:
        bundle: an inspected one.
        every_tensor: list those that cross between the UNet and the engines beside it one by one.
    """
    manifest = bundle.manifest
    model = manifest.model
    loras = ", ".join(f"{lora.file} x {lora.scale:g}" for lora in model.loras) or "none"
    settings = manifest.pipeline
    lines = [
        f"{bundle.path}: {model.name}, {manifest.precision}, {'fused' if manifest.fused else 'not fused'}, "
        f"{megabytes(bundle.bytes)} in {len(manifest.files)} files, made by sdc {manifest.sdc_version}",
        f"source {model.source}, weights {model.weights}, LoRAs: {loras}",
        f"pictures of {settings.default_width_px}x{settings.default_height_px} px, {settings.latent_channels} latent "
        f"channels at 1/{settings.vae_reduction} of the size, {settings.max_tokens} tokens",
        *(() if manifest.preset is None else _preset(manifest.preset)),
        "",
        *(line for spec in manifest.components.values() for line in _interface(spec, every_tensor)),
    ]
    return "\n\n".join(["\n".join(lines), *(_target(bundle, name) for name in manifest.targets)])


def _preset(preset: Preset) -> Iterator[str]:
    """What `sdc run` draws with, and why."""
    yield f"preset: {preset.way}"
    yield (
        f"    {preset.speed_up:.2f} times as fast on {preset.target} as {preset.reference_text()}; "
        f"{preset.budget} asked for, {preset.quality:.4g} measured on {preset.pictures} pictures"
    )
    for way in preset.cached:
        yield f"    --deepcache auto, {way.steps} steps of {way.sampler}: {options_text({'deepcache': way.deepcache})}"


def format_engine(engine: EngineFile) -> str:
    """What one engine file is, with all its operators."""
    lines = [f"{engine.path}: {engine.format}, {megabytes(engine.bytes)}"]
    lines += [f"{name}: {value}" for name, value in engine.properties.items()]
    lines += [f"input   {_tensor(tensor)}" for tensor in engine.inputs]
    lines += [f"output  {_tensor(tensor)}" for tensor in engine.outputs]
    if engine.weights:
        lines.append(f"weights {format_weights(engine)}")
    if engine.fused:
        lines.append("fused   " + ", ".join(f"{name} {count}" for name, count in engine.fused.items()))
    lines += [f"note: {note}" for note in engine.notes]
    if engine.operators:
        kind = "kernels, under TensorRT's names" if engine.format == "TensorRT plan" else "operators"
        lines += ["", f"{engine.nodes} {kind}", _columns(engine.operators)]
    return "\n".join(lines)


def format_origin(bundle: BundleDescription, target: str, component: str, *, every_tensor: bool = False) -> str:
    """What the bundle that an engine file lies in says about it."""
    manifest = bundle.manifest
    entry = manifest.targets[target]
    return "\n".join(
        [
            f"it is the {component} of target {target} in {bundle.path}: {manifest.model.name}, {manifest.precision}, "
            f"{_built(target, entry)}",
            *_interface(manifest.components[component], every_tensor),
        ]
    )


def _interface(spec: ComponentSpec, every_tensor: bool) -> list[str]:
    ranges = ", ".join(
        f"{symbol} {size.minimum} to {size.maximum}" + (f" in steps of {size.multiple}" if size.multiple > 1 else "")
        for symbol, size in spec.dimensions.items()
    )
    inputs, outputs = (", ".join(_tensors(spec, tensors, every_tensor)) for tensors in (spec.inputs, spec.outputs))
    return [f"{spec.name}: {inputs}", f"    -> {outputs}" + (f"  ({ranges})" if ranges else "")]


def _tensors(spec: ComponentSpec, tensors: Sequence[TensorSpec], every_tensor: bool) -> Iterator[str]:
    """Each tensor; those that cross from an engine beside the UNet together, unless `every_tensor`."""
    for part, group in groupby(tensors, key=lambda each: each.name.partition(".")[0]):
        found = list(group)
        if every_tensor or part not in _CROSSING or len(found) == 1:
            yield from (_tensor(TensorInfo(each.name, each.dtype, each.shape)) for each in found)
        else:
            count = megabytes(sum(_bytes(spec, each) for each in found))
            yield f"{len(found)} tensors {found[0].name} to {found[-1].name} ({count} a {_CROSSING[part]})"


def _bytes(spec: ComponentSpec, tensor: TensorSpec) -> int:
    """Of a tensor at the sizes that its component is tuned for."""
    sizes = (size if isinstance(size, int) else spec.dimensions[size].optimum for size in tensor.shape)
    return math.prod(sizes) * np.dtype(tensor.dtype).itemsize


def _target(bundle: BundleDescription, name: str) -> str:
    entry = bundle.manifest.targets[name]
    reason = bundle.unrunnable.get(name)
    engines = bundle.engines[name]
    parts = [
        f"target {name}: {_built(name, entry)}; " + ("runs here" if reason is None else f"does not run here: {reason}"),
        format_table(
            ["component", "size", "weights", "nodes", "most frequent"],
            [_engine_row(component, engine) for component, engine in engines.items()],
            words=["most frequent"],
        ),
    ]
    for component, counts in bundle.passes.get(name, {}).items():
        told = [
            f"{each.name} {each.matched}" + (f" ({each.skipped} left alone)" if each.skipped else "") for each in counts
        ]
        if told:
            parts.append(f"{component}: {', '.join(told)}")
    options: dict[str, list[str]] = {}
    for component, built in entry.engines.items():
        options.setdefault(_pairs(built.options), []).append(component)
    parts += [f"{', '.join(components)}: run with {told}" for told, components in options.items() if told]
    notes = dict.fromkeys(note for engine in engines.values() for note in engine.notes)
    return "\n".join([*parts, *(f"note: {note}" for note in notes)])


def _engine_row(component: str, engine: EngineFile) -> list[str]:
    return [
        component,
        megabytes(engine.bytes),
        format_weights(engine),
        str(engine.nodes),
        _frequent(engine.operators),
    ]


def _built(name: str, entry: TargetEntry) -> str:
    devices = Target(name, entry.backend, entry.compute_capabilities).devices
    return f"built for {devices} with {_pairs(entry.built_with) or entry.backend}"


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def format_weights(engine: EngineFile) -> str:
    """Stored values by element type, or bytes for a plan, without the smallest part."""
    if not engine.weights:
        return "unknown"
    total = sum(engine.weights.values())
    large = {kind: count for kind, count in engine.weights.items() if count >= total / 1000}
    if engine.format == "TensorRT plan":
        return ", ".join(f"{megabytes(count)} {kind}" for kind, count in large.items())
    return ", ".join(f"{count / 1e6:.2f} M {kind}" for kind, count in large.items())


def megabytes(count: int) -> str:
    """A size in units of 10⁶ bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _frequent(operators: Mapping[str, int]) -> str:
    shown = list(operators.items())[:OPERATORS_IN_A_LINE]
    rest = len(operators) - len(shown)
    return ", ".join(f"{name} {count}" for name, count in shown) + (f", {rest} kinds more" if rest else "")


def _columns(operators: Mapping[str, int]) -> str:
    """All counts, a few in a line."""
    cells = [f"{count:6} {name}" for name, count in operators.items()]
    width = max(map(len, cells)) + 2
    columns = max(1, min(COLUMNS, 120 // width))
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return "\n".join("".join(cell.ljust(width) for cell in line).rstrip() for line in lines)
