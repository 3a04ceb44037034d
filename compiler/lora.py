"""`sdc lora`: a bundle with other LoRAs, made again from its checkpoint as it was made the first time.

LoRAs are always folded into the weights of the checkpoint, never into a bundle's: adding one and taking it away again
gives the first bundle, byte for byte. What does not depend on the weights is not made again: engines of networks that
no LoRA changes are in the stage cache, and the calibration and the plan of precisions are the bundle's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sdc.compiler.bundle.request_file import StoredRequest, read_request
from sdc.compiler.bundle.writer import check_new_place
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.lora_argument import FoldedLora, LoraSource, parse_lora
from sdc.engines.bundle import open_bundle
from sdc.engines.digests import file_sha256
from sdc.engines.errors import InputError


@dataclass(frozen=True)
class LoraChange:
    """What becomes of a bundle's LoRAs.

    Attributes:
        add: ``FILE[:SCALE]`` each, behind those that stay.
        remove: names or paths of those that go.
        clear: whether all go.
    """

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    clear: bool = False


def request_with_loras(folder: Path, change: LoraChange, out: Path) -> ExportRequest:
    """The request for a bundle like the one in `folder` but for its LoRAs.

    Raises:
        InputError: nothing is to be changed; a LoRA is there twice, or is not there, or its file is; `out` exists or is
            inside the bundle; or what the bundle was made from is gone.
        BundleError: the bundle is damaged.
    """
    bundle = open_bundle(folder)
    check_new_place([folder], out)
    stored = read_request(bundle)
    kept = _kept(stored.loras, change)
    added = [parse_lora(text) for text in change.add]
    if not added and kept == list(stored.loras):
        raise InputError("nothing is to be changed", hint="give --add FILE[:SCALE], --remove FILE or --clear")
    _check_files(kept, added)
    check_source(folder, stored)
    loras = [*((lora.file, lora.scale) for lora in kept), *((lora.name, lora.scale) for lora in added)]
    source = replace(stored.request.source, loras=tuple(f"{file}:{scale!r}" for file, scale in loras))
    return replace(stored.request, source=source, out=out)


def _kept(loras: tuple[FoldedLora, ...], change: LoraChange) -> list[FoldedLora]:
    if change.clear and (change.remove or not loras):
        raise InputError(
            "--clear removes all LoRAs already" if loras else "the bundle has no LoRA that --clear could remove",
            hint="leave out --remove" if loras else "leave it out",
        )
    removed = [_named(text, loras) for text in change.remove]
    return [] if change.clear else [lora for lora in loras if lora not in removed]


def _named(text: str, loras: tuple[FoldedLora, ...]) -> FoldedLora:
    """The LoRA of a name, a file name or a path."""
    found = [lora for lora in loras if text in (lora.file, Path(lora.file).name, _path(lora).name)]
    found = found or [lora for lora in loras if Path(text).absolute() == _path(lora)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(lora.file for lora in loras) or "none"
    if found:
        raise InputError(f"the bundle has {len(found)} LoRAs of the name {text}", hint=f"give the path; it has {names}")
    raise InputError(f"the bundle has no LoRA {text}", hint=f"it has {names}")


def _check_files(kept: list[FoldedLora], added: list[LoraSource]) -> None:
    """Pass if every file is there, those of the bundle as they were, and none comes twice."""
    seen: dict[str, str] = {}
    for lora in kept:
        path = _path(lora)
        if not path.is_file() or file_sha256(path) != lora.sha256:
            state = "has changed since" if path.is_file() else "is gone, which"
            raise InputError(
                f"the LoRA {path} {state} the bundle was made" + ("" if path.is_file() else " with"),
                hint=f"bring it back, or --remove {lora.file}",
            )
        seen[lora.sha256] = lora.file
    for source in added:
        if not source.path.is_file():
            raise InputError(f"LoRA {source.path} not found", hint="check the path")
        digest = file_sha256(source.path)
        if digest in seen:
            raise InputError(
                f"the LoRA {source.path} is there already, as {seen[digest]}",
                hint="for another scale, --remove it and --add FILE:SCALE",
            )
        seen[digest] = source.name


def _path(lora: FoldedLora) -> Path:
    return parse_lora(f"{lora.file}:1").path


def check_source(folder: Path, stored: StoredRequest) -> None:
    """Pass if what a bundle was made from is there; what a hub or sdc itself has is looked for when it is loaded.

    Raises:
        InputError: a folder or a file is gone.
    """
    source = stored.request.source
    for path in (Path(source.model), source.config):
        if path is not None and path.is_absolute() and not path.exists():
            raise InputError(
                f"{path} is gone, which {folder} was made from: LoRAs are folded into the weights there",
                hint="bring it back, or export the bundle again",
            )
