"""The bundles whose ways are searched, checked beside each other before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings
from sdc.compiler.evaluate.statistics import MODELS_FOLDER
from sdc.compiler.evaluate.stored_runs import run_digest
from sdc.compiler.evaluate.verdicts import digest_of
from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.errors import InputError, TargetError


@dataclass(frozen=True)
class Candidate:
    """A bundle whose ways are searched.

    Attributes:
        bundle: stays as it is.
        target: whose engines draw.
        digest: changes with whatever changes its pictures and their figures.
        title: what begins the names of its stages; empty where it is the only bundle.
    """

    bundle: Bundle
    target: str
    digest: str
    title: str

    @property
    def path(self) -> Path:
        """Its folder, as the user gave it."""
        return self.bundle.path


def open_candidates(paths: Sequence[Path], settings: Settings) -> tuple[Candidate, ...]:
    """Open bundles, and pass only if their pictures can be compared: equal prompts, one size, engines that run here.

    Args:
        paths: one or more.
        settings: name the target, if any.

    Raises:
        InputError: there is none, or two are the same, differ in prompts or size, or one of several does not run here.
        BundleError: a bundle is damaged.
        TargetError: this machine does not run the only bundle.
    """
    if not paths:
        raise InputError("expected one bundle or more, found none", hint="name the bundles to tune")
    bundles = [open_bundle(path) for path in paths]
    for bundle in bundles[1:]:
        _check_alike(bundles[0], bundle)
    targets = [_target_of(bundle, settings.target, alone=len(bundles) == 1) for bundle in bundles]
    known: dict[str, Bundle] = {}
    for bundle, target in zip(bundles, targets, strict=True):
        same = known.setdefault(pictures_digest(bundle, target), bundle)
        if same is not bundle:
            raise InputError(
                f"expected bundles that differ, found {same.path} and {bundle.path} with the same engines for {target}",
                hint="name each bundle once",
            )
    names = short_names(paths)
    return tuple(
        Candidate(bundle, target, digest, f"{names[bundle.path]}: " if len(bundles) > 1 else "")
        for bundle, target, digest in zip(bundles, targets, known, strict=True)
    )


def open_reference(path: Path, candidates: Sequence[Candidate], settings: Settings) -> Candidate:
    """Open the bundle that all are compared with: one of them, or another that is asked for the same pictures.

    Raises:
        InputError: a candidate's pictures cannot be compared with its, or it does not run here.
        BundleError: it is damaged.
    """
    for candidate in candidates:
        if candidate.path.resolve() == path.resolve():
            return candidate
    bundle = open_bundle(path)
    for candidate in candidates:
        _check_alike(bundle, candidate.bundle)
    target = _target_of(bundle, settings.target, alone=False)
    return Candidate(bundle, target, pictures_digest(bundle, target), "")


def _check_alike(first: Bundle, other: Bundle) -> None:
    """Pass if two bundles are asked for the same pictures: of one size, and of `tiny` or of other models.

    Other models may differ in name: one that was made smaller has that of its folder.
    """
    ours, theirs = first.manifest, other.manifest
    if (ours.model.name == JUDGED_MODEL) != (theirs.model.name == JUDGED_MODEL):
        raise InputError(
            f"expected bundles that draw the same prompts, found {ours.model.name!r} in {first.path} and "
            f"{theirs.model.name!r} in {other.path}",
            hint=f"call the folder of a smaller {JUDGED_MODEL} {JUDGED_MODEL} too, or tune each by itself",
        )
    sizes = [(each.pipeline.default_width_px, each.pipeline.default_height_px) for each in (ours, theirs)]
    if sizes[0] != sizes[1]:
        found = " and ".join(
            f"{width}x{height} px in {each.path}" for (width, height), each in zip(sizes, (first, other), strict=True)
        )
        raise InputError(f"expected bundles that draw one size, found {found}", hint="tune each by itself")


def _target_of(bundle: Bundle, name: str | None, *, alone: bool) -> str:
    try:
        return bundle.choose_target(name).name
    except TargetError as error:
        if alone:
            raise
        raise InputError(
            f"expected bundles that run here, found {bundle.path}: {error}", hint="or leave this bundle out"
        ) from error


def pictures_digest(bundle: Bundle, target: str) -> str:
    """Sixteen hexadecimal digits that change with whatever changes a bundle's pictures or the figures of them."""
    judges = [digest_of(MODELS_FOLDER / f"{name}.safetensors") for name in ("judge", "statistics")]
    return run_digest(bundle.manifest, target, judges if bundle.manifest.model.name == JUDGED_MODEL else [])


def short_names(paths: Sequence[Path]) -> Mapping[Path, str]:
    """Each folder's name, with as many folders above it as tell it from the others."""
    parts = {path: path.resolve().parts for path in paths}

    def name(path: Path) -> str:
        others = [each for other, each in parts.items() if other != path]
        own = parts[path]
        count = next((n for n in range(1, len(own)) if all(each[-n:] != own[-n:] for each in others)), len(own))
        return str(Path(*own[-count:]))

    return {path: name(path) for path in paths}
