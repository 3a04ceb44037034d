"""The manifest of a bundle, `sdc.json`: its dataclasses and its strict reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdc.engines.checked_json import JsonValue, read_json
from sdc.engines.errors import BundleError, InputError
from sdc.engines.preset import Preset, read_preset
from sdc.engines.specs import COMPONENTS, HOISTED, SHALLOW, ComponentSpec, DimensionRange, TensorSpec, is_shard_name
from sdc.engines.wiring import check_wiring, shards_of

SCHEMA = 1
"""The schema that this version of sdc writes, and the only one that it reads."""

MANIFEST_NAME = "sdc.json"
TENSOR_DTYPES = ("float32", "int64")


@dataclass(frozen=True)
class LoraEntry:
    """A LoRA that was folded into the weights."""

    file: str
    scale: float


@dataclass(frozen=True)
class ModelEntry:
    """What was exported: `weights` is "trained" or says how they were made up."""

    name: str
    source: str
    loras: tuple[LoraEntry, ...]
    weights: str


@dataclass(frozen=True)
class PipelineSettings:
    """What the pipeline around the engines has to know."""

    vae_scaling_factor: float
    vae_shift_factor: float
    vae_reduction: int
    latent_channels: int
    default_height_px: int
    default_width_px: int
    max_tokens: int
    time_cond_proj_dim: int | None


@dataclass(frozen=True)
class EngineEntry:
    """One engine: its files (the backend opens the first) and what the backend has to be told at load time."""

    files: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class TargetEntry:
    """The engines that were built for one target."""

    backend: str
    built_with: Mapping[str, str]
    compute_capabilities: tuple[str, ...]
    engines: Mapping[str, EngineEntry]


@dataclass(frozen=True)
class FileEntry:
    """Digest (hexadecimal SHA-256) and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All that `sdc.json` says; paths are relative to the bundle, with forward slashes.

    Only bundles of `sdc tune` have a ``preset``; versions of sdc that do not know the key read them without it.
    """

    schema: int
    sdc_version: str
    model: ModelEntry
    precision: str
    fused: bool
    components: Mapping[str, ComponentSpec]
    pipeline: PipelineSettings
    targets: Mapping[str, TargetEntry]
    files: Mapping[str, FileEntry]
    preset: Preset | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `read_manifest` is the inverse."""
        return {
            "schema": self.schema,
            "sdc_version": self.sdc_version,
            "model": {**asdict(self.model), "loras": [asdict(lora) for lora in self.model.loras]},
            "precision": self.precision,
            "fused": self.fused,
            "components": {name: spec.to_json() for name, spec in self.components.items()},
            "pipeline": asdict(self.pipeline),
            "targets": {name: _target_to_json(entry) for name, entry in self.targets.items()},
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            **({} if self.preset is None else {"preset": self.preset.to_json()}),
        }


def _target_to_json(entry: TargetEntry) -> dict[str, Any]:
    return {
        "backend": entry.backend,
        "built_with": dict(entry.built_with),
        "compute_capabilities": list(entry.compute_capabilities),
        "engines": {
            component: {"files": list(engine.files), "options": dict(engine.options)}
            for component, engine in entry.engines.items()
        },
    }


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest file; keys that this version does not know are ignored.

    Raises:
        BundleError: the file is missing, no JSON, of another schema, lacks a key, has a value of the wrong type, names
            a path outside the bundle, or an engine's component or file that it does not describe; or the UNet takes
            an input that nothing provides.
    """
    root = read_json(path)
    schema = root.member("schema")
    if schema.value != SCHEMA or isinstance(schema.value, bool):
        raise BundleError(
            f"{schema.place}: this version of sdc reads schema {SCHEMA}, found {schema.value!r}",
            hint="export the bundle again, or use the version of sdc that wrote it",
        )
    manifest = Manifest(
        schema=SCHEMA,
        sdc_version=root.member("sdc_version").text(),
        model=_read_model(root.member("model")),
        precision=root.member("precision").text(),
        fused=root.member("fused").flag(),
        components={name: _read_component(name, each) for name, each in root.member("components").members()},
        pipeline=_read_pipeline(root.member("pipeline")),
        targets={name: _read_target(each) for name, each in root.member("targets").members()},
        files={read_path(name, each.place): _read_file(each) for name, each in root.member("files").members()},
        preset=read_preset(root.member("preset")) if "preset" in root.value else None,
    )
    _check_references(manifest, path.name)
    return manifest


def read_path(text: str, place: str) -> str:
    """A path of the manifest, refused unless it is relative, normal, with forward slashes, and stays in the bundle.

    Raises:
        BundleError: it is not.
    """
    path = PurePosixPath(text)
    drive = ":" in text.split("/", 1)[0]
    if not text or path.is_absolute() or drive or ".." in path.parts or "\\" in text or "\0" in text:
        raise BundleError(f"{place}: the path {text!r} leaves the bundle", hint="do not use this bundle")
    if str(path) != text or text == ".":
        raise BundleError(f"{place}: expected a normal relative path, found {text!r}", hint="export the bundle again")
    return text


def _read_model(value: JsonValue) -> ModelEntry:
    loras = tuple(
        LoraEntry(lora.member("file").text(), lora.member("scale").number())
        for lora in value.member("loras").elements()
    )
    return ModelEntry(
        name=value.member("name").text(),
        source=value.member("source").text(),
        loras=loras,
        weights=value.member("weights").text(),
    )


def _read_pipeline(value: JsonValue) -> PipelineSettings:
    condition = value.member("time_cond_proj_dim")
    return PipelineSettings(
        vae_scaling_factor=value.member("vae_scaling_factor").number(),
        vae_shift_factor=value.member("vae_shift_factor").number(),
        vae_reduction=value.member("vae_reduction").integer(1),
        latent_channels=value.member("latent_channels").integer(1),
        default_height_px=value.member("default_height_px").integer(1),
        default_width_px=value.member("default_width_px").integer(1),
        max_tokens=value.member("max_tokens").integer(1),
        time_cond_proj_dim=None if condition.value is None else condition.integer(1),
    )


def _read_component(name: str, value: JsonValue) -> ComponentSpec:
    known = (*COMPONENTS, *HOISTED, SHALLOW)
    if not (name in known or is_shard_name(name)) or value.member("name").value != name:
        raise BundleError(f"{value.place}: expected a component named as one of {', '.join(known)}")
    spec = ComponentSpec(
        name=name,
        inputs=tuple(_read_tensor(each) for each in value.member("inputs").elements()),
        outputs=tuple(_read_tensor(each) for each in value.member("outputs").elements()),
        dimensions={symbol: _read_range(each) for symbol, each in value.member("dimensions").members()},
    )
    for tensor in spec.inputs:
        for size in tensor.shape:
            if isinstance(size, str) and size not in spec.dimensions:
                raise BundleError(f"{value.place}: the dimension {size!r} of {tensor.name} has no range")
    return spec


def _read_tensor(value: JsonValue) -> TensorSpec:
    row = list(value.elements())
    if len(row) != 3:
        value.refuse("[name, element type, shape]")
    name, dtype, shape = row
    if dtype.value not in TENSOR_DTYPES:
        dtype.refuse(f"one of {', '.join(TENSOR_DTYPES)}")
    sizes = tuple(each.text() if isinstance(each.value, str) else each.integer(1) for each in shape.elements())
    return TensorSpec(name.text(), dtype.text(), sizes)


def _read_range(value: JsonValue) -> DimensionRange:
    sizes = [each.integer(1) for each in value.elements()]
    if len(sizes) != 4:
        value.refuse("[minimum, optimum, maximum, multiple]")
    try:
        return DimensionRange(*sizes)
    except InputError as error:
        raise BundleError(f"{value.place}: {error}") from error


def _read_target(value: JsonValue) -> TargetEntry:
    return TargetEntry(
        backend=value.member("backend").text(),
        built_with={name: each.text() for name, each in value.member("built_with").members()},
        compute_capabilities=tuple(each.text() for each in value.member("compute_capabilities").elements()),
        engines={name: _read_engine(each) for name, each in value.member("engines").members()},
    )


def _read_engine(value: JsonValue) -> EngineEntry:
    files = tuple(read_path(each.text(), each.place) for each in value.member("files").elements())
    if not files:
        value.member("files").refuse("at least one file")
    return EngineEntry(files, {name: each.value for name, each in value.member("options").members()})


def _read_file(value: JsonValue) -> FileEntry:
    digest = value.member("sha256")
    if len(digest.text()) != 64 or not set(digest.text()) <= set("0123456789abcdef"):
        digest.refuse("64 hexadecimal digits")
    return FileEntry(digest.text(), value.member("bytes").integer(0))


def _check_references(manifest: Manifest, place: str) -> None:
    check_wiring(manifest.components, place=f"{place}: components")
    for target, entry in manifest.targets.items():
        for component, engine in entry.engines.items():
            where = f"{place}: targets.{target}.engines.{component}"
            if component not in manifest.components:
                raise BundleError(f"{where}: the manifest does not describe the component {component!r}")
            for file in engine.files:
                if file not in manifest.files:
                    raise BundleError(f"{where}: the file {file!r} has no digest in the manifest")
        unets = tuple(shard.name for shard in shards_of(manifest.components)) or ("unet",)
        for name in (*unets, *HOISTED, SHALLOW) if not entry.engines.keys().isdisjoint({*unets, "unet"}) else ():
            if name in manifest.components and name not in entry.engines:
                raise BundleError(
                    f"{place}: targets.{target} has no engine for {name}, which belongs to its unet",
                    hint="export the bundle again",
                )
