"""Bundles that are given to a benchmark of peers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peers.environments import SetUpError
from peers.inputs import Architecture, link_bundle

from sdc.engines.bundle import open_bundle


def described(bundle: Path) -> tuple[str, Architecture]:
    """Its precision, and an architecture that it is of."""
    manifest = open_bundle(bundle).manifest
    return manifest.precision, Architecture(manifest.model.name, manifest.model.weights.partition(",")[0], 0)


def test_the_bundle_that_is_given_last_counts(small_bundle: Path, tmp_path: Path) -> None:
    name, architecture = described(small_bundle)
    made, other = tmp_path / "made", tmp_path / "other"
    shutil.copytree(small_bundle, other)
    for bundle in (small_bundle, other, small_bundle):
        link_bundle(made, name, bundle, architecture)
        assert (made / f"sdc-{name}" / "bundle").resolve() == bundle.resolve()


def test_a_bundle_that_sides_have_made_is_not_passed_over(small_bundle: Path, tmp_path: Path) -> None:
    name, architecture = described(small_bundle)
    place = tmp_path / "made" / f"sdc-{name}" / "bundle"
    shutil.copytree(small_bundle, place)
    with pytest.raises(SetUpError, match="leave out --bundles, or remove it"):
        link_bundle(tmp_path / "made", name, small_bundle, architecture)
    assert not place.is_symlink()
    open_bundle(place)


def test_a_bundle_of_another_precision_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    _, architecture = described(small_bundle)
    with pytest.raises(SetUpError, match=r"expected a bundle of .*, w4, found"):
        link_bundle(tmp_path / "made", "w4", small_bundle, architecture)
    assert not (tmp_path / "made").exists()
