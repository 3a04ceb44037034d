"""Opening a bundle: everything in it is checked before it is used, and nothing is ever written into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdc.engines.digests import file_sha256
from sdc.engines.errors import BundleError, InputError, TargetError
from sdc.engines.manifest import MANIFEST_NAME, EngineEntry, Manifest, TargetEntry, read_manifest
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.sharded import ShardedSession
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX, Target, runnable
from sdc.engines.wiring import shards_of

_PREFERENCE = (TENSORRT_RTX, ONNXRUNTIME_CUDA, OPENVINO, ONNXRUNTIME)
"""Backends from the fastest to the slowest."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: what its `sdc.json` says.
        verify: whether a file's digest is checked before the file is used.
    """

    path: Path
    manifest: Manifest
    verify: bool

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists, after checking it.

        Raises:
            BundleError: the manifest does not list it, or its bytes have changed.
        """
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no file {name!r}", hint="export the bundle again")
        if self.verify:
            self.check_digests([name])
        return self.path / name

    def check_digests(self, names: Iterable[str] | None = None, *, remembered: bool = True) -> None:
        """Compare files with their digests in the manifest.

        Args:
            names: the files; None means all.
            remembered: an unchanged file that was read before is not read again.

        Raises:
            BundleError: a file has changed; it names the file.
        """
        for name in self.manifest.files if names is None else names:
            try:
                digest = file_sha256(self.path / name, remembered=remembered)
            except OSError as error:
                raise BundleError(f"cannot read {self.path / name}: {error.strerror}") from error
            if digest != self.manifest.files[name].sha256:
                raise BundleError(
                    f"{self.path / name} has changed since the export: its SHA-256 begins with {digest[:12]}, "
                    f"the manifest says {self.manifest.files[name].sha256[:12]}",
                    hint="export the bundle again, or copy it again from where it came",
                )

    def target(self, name: str) -> Target:
        """The target of that name as the bundle's engines were built for it.

        Raises:
            TargetError: the bundle has no such target.
        """
        if name not in self.manifest.targets:
            raise TargetError(
                f"the bundle {self.path} has no engines for the target {name!r}",
                hint=f"it has {', '.join(self.manifest.targets) or 'none'}; export it with --target {name}",
            )
        entry = self.manifest.targets[name]
        return Target(name, entry.backend, entry.compute_capabilities)

    def choose_target(self, name: str | None = None) -> Target:
        """The named target, or else the fastest of the bundle's targets that this machine can run.

        Raises:
            TargetError: the bundle has no such target, or this machine cannot run it.
        """
        if name is not None:
            target = self.target(name)
            reason = runnable(target)
            if reason is not None:
                origin = _origin(name, self.manifest.targets[name])
                raise TargetError(
                    f"the target {name!r} cannot run here: {reason}",
                    hint=f"{origin}; the bundle has {', '.join(self.manifest.targets)}",
                )
            return target
        return self._best_target()

    def _best_target(self) -> Target:
        def rank(target: Target) -> int:
            return _PREFERENCE.index(target.backend) if target.backend in _PREFERENCE else len(_PREFERENCE)

        reasons = []
        for target in sorted(map(self.target, self.manifest.targets), key=rank):
            reason = runnable(target)
            if reason is None:
                return target
            reasons.append(f"{target.name}: {reason}")
        raise TargetError(
            f"this machine can run no target of the bundle {self.path} ({'; '.join(reasons) or 'it has none'})",
            hint="export it with --target cpu; `sdc doctor` shows what this machine can run",
        )

    def load_session(
        self, component: str, target: Target, *, threads: int | None = None, prefetch: bool = True
    ) -> Session:
        """Check and load one engine; of a UNet that is in shards none yet: its session loads them as it runs.

        Args:
            component: e.g. "unet".
            target: from `choose_target`.
            threads: CPU threads; None leaves it to the backend.
            prefetch: whether the next shard of a UNet is loaded while one runs.

        Raises:
            BundleError: an engine file has changed or the backend cannot read it.
            TargetError: the target has no engine for the component, or this machine cannot run it.
        """
        entry = self.manifest.targets[self.target(target.name).name]
        shards = shards_of(self.manifest.components)
        if component == "unet" and shards:
            load = partial(self.load_session, target=target, threads=threads)
            return ShardedSession(self.manifest.components[component], shards, load, prefetch=prefetch)
        if component not in entry.engines:
            raise TargetError(
                f"the target {target.name!r} of the bundle {self.path} has no engine for {component!r}",
                hint=f"it has {', '.join(entry.engines) or 'none'}",
            )
        return open_session(self._engine_source(component, target, entry, entry.engines[component]), threads=threads)

    def _engine_source(self, component: str, target: Target, entry: TargetEntry, engine: EngineEntry) -> EngineSource:
        return EngineSource(
            spec=self.manifest.components[component],
            backend=entry.backend,
            files=tuple(self.file(name) for name in engine.files),
            options=engine.options,
            compute_capabilities=entry.compute_capabilities,
            origin=_origin(target.name, entry),
        )


def _origin(name: str, entry: TargetEntry) -> str:
    built_with = " and ".join(f"{package} {version}" for package, version in entry.built_with.items())
    devices = Target(name, entry.backend, entry.compute_capabilities).devices
    return f"{name!r} was built for {devices} with {built_with or entry.backend}"


def open_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Open a bundle after checking its manifest, the place and the size of every file, and the small files' digests.

    Engines are gigabytes: their digests are checked when they are loaded, and an unchanged file only once.

    Args:
        path: the bundle's folder.
        verify: False checks no digest, only sizes.

    Raises:
        BundleError: it is damaged.
        InputError: there is no bundle.
    """
    folder = Path(path)
    if not (folder / MANIFEST_NAME).is_file():
        found = "no such folder" if not folder.exists() else f"there is no {MANIFEST_NAME} in it"
        raise InputError(f"{folder} is no bundle: {found}", hint="`sdc export` makes one")
    manifest = read_manifest(folder / MANIFEST_NAME)
    _check_places_and_sizes(folder, manifest)
    bundle = Bundle(folder, manifest, verify)
    if verify:
        engines = (engine for target in manifest.targets.values() for engine in target.engines.values())
        of_engines = {name for engine in engines for name in engine.files}
        bundle.check_digests(name for name in manifest.files if name not in of_engines)
    return bundle


def _check_places_and_sizes(folder: Path, manifest: Manifest) -> None:
    root = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"the file {path} is missing", hint="export the bundle again")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"{path} is a link that leaves the bundle", hint="do not use this bundle")
        if path.stat().st_size != entry.bytes:
            raise BundleError(
                f"{path} has {path.stat().st_size:,} bytes, the manifest says {entry.bytes:,}",
                hint="the file is truncated or changed: export or copy the bundle again",
            )
