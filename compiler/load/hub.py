"""Checkpoints of the Hugging Face hub: only the files that are compiled are downloaded, into the hub's own cache.

``huggingface_hub`` reads the environment (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdc.compiler.load.checkpoint import Checkpoint
from sdc.compiler.load.folder import listed_shards, open_folder, read_model_index, weight_candidates
from sdc.compiler.load.networks import NETWORKS
from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

_SMALL_FILES = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/*"]
_SMALL_FILES += [f"{network}/config.json" for network in NETWORKS]
_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return _ID.fullmatch(text) is not None


def open_hub(text: str, *, name: str, seed: int | None = None) -> Checkpoint:
    """Download what is missing of a hub's checkpoint, and open it.

    Args:
        text: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        name: what the user called it.
        seed: take random weights of this seed and download configurations only.

    Raises:
        InputError: there is no such checkpoint, it cannot be reached, or it is of a kind that is not supported.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not OWNER/NAME or OWNER/NAME@REVISION")
    repository, revision = match["repository"], match["revision"]
    with _explain(text):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_SMALL_FILES))
        read_model_index(folder)  # before gigabytes of an unsupported pipeline are downloaded
        commit = folder.name
        for network in NETWORKS if seed is None else ():
            _fetch_weights(repository, commit, network)
    return open_folder(folder, name=name, source=f"{repository}@{commit}", seed=seed)


def _fetch_weights(repository: str, commit: str, network: str) -> None:
    """Have a network's weights in the cache: the first of the candidates that the repository holds.

    Raises:
        InputError: it holds none of them.
    """
    candidates = weight_candidates(network)
    unreachable: LocalEntryNotFoundError | None = None
    for candidate in candidates:
        try:
            path = Path(hf_hub_download(repository, candidate, subfolder=network, revision=commit))
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            log.debug("%s has no %s/%s", repository, network, candidate)
        else:
            for shard in listed_shards(path):
                hf_hub_download(repository, shard, subfolder=network, revision=commit)
            return
    if unreachable is not None:
        raise unreachable
    raise InputError(
        f"{repository} has no safetensors weights of {network}: none of {', '.join(candidates)} in {network}/",
        hint="choose a repository with safetensors weights; pickles are not opened",
    )


@contextmanager
def _explain(text: str) -> Iterator[None]:
    """Turn the hub's errors into one that says what to do."""
    try:
        yield
    except GatedRepoError as error:
        hint = "accept its licence on the hub with your account, and set HF_TOKEN"
        raise InputError(f"access to {text} is gated", hint=hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private one set HF_TOKEN"
        raise InputError(f"the hub has no model {text}, and there is no such folder", hint=hint) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the hub has no such revision: {text}", hint="check what stands after the @") from error
    except LocalEntryNotFoundError as error:
        hint = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder or a .safetensors file"
        raise InputError(f"{text} is not whole in the local cache and the hub is not reachable", hint=hint) from error
    except HFValidationError as error:
        hint = "give a folder or a .safetensors file that is there, or a hub id such as owner/name"
        raise InputError(f"there is no {text}, and it is no hub id", hint=hint) from error
    except OSError as error:
        raise InputError(f"downloading {text} failed: {error}", hint="check the connection and the disk") from error
