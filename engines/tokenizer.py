"""CLIP's tokenizer on the `tokenizers` library, from any of the file sets that Stable Diffusion models ship.

Source: Radford et al., arXiv:2103.00020, and the ``CLIPTokenizer`` of transformers, whose ids it equals.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP cuts text before byte-pair encoding."""

_QUOTED = 40
"""Characters that a warning quotes of what was cut from a prompt."""

DEFAULT_SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


@dataclass(frozen=True)
class ClipTokenizer:
    """Prompts to token ids.

    Attributes:
        encoder: text to ids, without start, end and padding.
        start_id: id of the first token of every prompt; likewise ``end_id`` and ``pad_id``.
        max_tokens: tokens of an encoded prompt, start and end included.
    """

    encoder: Tokenizer
    start_id: int
    end_id: int
    pad_id: int
    max_tokens: int = 77

    def encode(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts; what does not fit is cut, with a warning that quotes its beginning.

        Returns:
            [len(prompts), max_tokens], int64.
        """
        input_ids = np.full((len(prompts), self.max_tokens), self.pad_id, np.int64)
        room = self.max_tokens - 2
        for row, prompt in zip(input_ids, prompts, strict=True):
            encoding = self.encoder.encode(prompt, add_special_tokens=False)
            if len(encoding.ids) > room:
                cut = prompt[encoding.offsets[room][0] :]
                begin = cut if len(cut) <= _QUOTED else f"{cut[:_QUOTED]}…"
                log.warning("the prompt has more than %d tokens; %d characters were cut: %r", room, len(cut), begin)
            ids = [self.start_id, *encoding.ids[:room], self.end_id]
            row[: len(ids)] = ids
        return input_ids


def load_tokenizer(folder: Path, *, max_tokens: int = 77) -> ClipTokenizer:
    """Read a tokenizer folder: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``, and the configuration files.

    Raises:
        InputError: a file is missing or damaged, or the tokenizer is not CLIP's kind of byte-pair encoding.
    """
    try:
        vocabulary, merges, added = _read_model(folder)
        special, added_in_config = _read_special_tokens(folder)
        unknown = special["unk_token"].content
        model = BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {error}",
            hint="it needs tokenizer.json, or vocab.json and merges.txt, in CLIP's format",
        ) from error
    encoder = Tokenizer(model)
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    _add_tokens(encoder, special, {**added, **added_in_config})

    def find(name: str) -> int:
        token = special[name].content
        found: int | None = encoder.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer in {folder} has no token {token!r} ({name})")
        return found

    return ClipTokenizer(encoder, find("bos_token"), find("eos_token"), find("pad_token"), max_tokens)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _token(value: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """A token as configuration files give it: plain text, or text with rules of how it matches."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    rules = {key: bool(value[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value}
    return AddedToken(value["content"], special=bool(value.get("special", special)), **rules)


Merges = list[tuple[str, str]]
AddedTokens = dict[int, AddedToken]


def _read_model(folder: Path) -> tuple[dict[str, int], Merges, AddedTokens]:
    """Vocabulary, merges, and tokens beside the vocabulary by id."""
    whole = _read_json(folder / "tokenizer.json")
    if whole is None:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
        return vocabulary, merges, {}
    model = whole["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ValueError("expected byte-pair encoding whose words end in '</w>', as CLIP's")
    merges = [_pair(merge) for merge in model["merges"]]
    added = {int(entry["id"]): _token(entry, special=False) for entry in whole.get("added_tokens", [])}
    return model["vocab"], merges, added


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _read_special_tokens(folder: Path) -> tuple[dict[str, AddedToken], AddedTokens]:
    """The named special tokens, and further added ones by id.

    ``special_tokens_map.json`` and ``added_tokens.json`` are the old places: they count unless
    ``tokenizer_config.json`` lists the added tokens itself. Stable Diffusion 2 names its padding token, "!", there.
    """
    config = _read_json(folder / "tokenizer_config.json") or {}
    named = {name: config.get(name) or default for name, default in DEFAULT_SPECIAL_TOKENS.items()}
    added: AddedTokens = {}
    if "added_tokens_decoder" in config:
        added = {int(index): _token(value, special=False) for index, value in config["added_tokens_decoder"].items()}
    else:
        special_map = _read_json(folder / "special_tokens_map.json") or {}
        named.update({name: value for name, value in special_map.items() if name in named})
        extra = _read_json(folder / "added_tokens.json") or {}
        contents = {value if isinstance(value, str) else value["content"] for value in named.values()}
        for content, index in extra.items():
            special = content in contents
            added[int(index)] = AddedToken(content, special=special, normalized=not special)
    return {name: _token(value, special=True) for name, value in named.items()}, added


def _add_tokens(encoder: Tokenizer, special: Mapping[str, AddedToken], added: AddedTokens) -> None:
    """Add tokens beside the vocabulary in the order of their ids, then the special ones that were not among them."""
    encoder.add_tokens([token for _, token in sorted(added.items())])
    present = {token.content for token in added.values()}
    encoder.add_special_tokens([token for token in special.values() if token.content not in present])
