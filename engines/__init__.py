"""The thin runtime: a bundle in, pictures out, without torch, onnx, diffusers or transformers.

Importing this package costs next to nothing; NumPy, the tokenizer and a backend are imported when a bundle is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdc.engines.pipeline import Pipeline

__all__ = ["load"]


def load(
    bundle: str | os.PathLike[str],
    target: str | None = None,
    *,
    verify: bool = True,
    threads: int | None = None,
    keep_loaded: bool = True,
    prefetch: bool = True,
) -> Pipeline:
    """Open a bundle; its engines are loaded when they are first needed.

    Args:
        bundle: the bundle's folder.
        target: which of the bundle's targets to run; the best one that this machine can run when missing.
        verify: check the digests of files before they are used.
        threads: CPU threads of the engines; the backend's choice when missing.
        keep_loaded: whether engines stay loaded for the next picture. If not, each is released as soon as a picture
            does not need it any more: memory holds the text encoder, the UNet or the autoencoder, one at a time, but
            for what `prefetch` loads before.
        prefetch: load engines while others run: on the CPU in OpenVINO the UNet beside the text encoder, and of a UNet
            in shards (`sdc export --shards`) the next one. Without, memory holds one at a time.

    Raises:
        BundleError: the bundle is missing or damaged.
        InputError: the bundle's tokenizer or schedule cannot be used.
        TargetError: the bundle has no such target, or this machine cannot run it.
    """
    from sdc.engines.pipeline import open_pipeline

    return open_pipeline(bundle, target, verify=verify, threads=threads, keep_loaded=keep_loaded, prefetch=prefetch)
