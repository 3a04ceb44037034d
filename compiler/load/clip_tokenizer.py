"""CLIP's own tokenizer, written as files from the merges that ship with sdc."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
"""Merges that CLIP uses of the file: the vocabulary without single bytes and the two special tokens."""


def clip_tokenizer_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of CLIP's tokenizer (49,408 tokens), as they stand beside Stable Diffusion 1.x.

    Args:
        config: content of ``tokenizer_config.json``.

    Source: ``simple_tokenizer.py`` of https://github.com/openai/CLIP (MIT licence).
    """
    packed = files("sdc.compiler.load").joinpath("configs/clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1 : MERGES + 1]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    specials = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return complete_tokenizer(
        {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
            "special_tokens_map.json": json.dumps(specials, indent=2, sort_keys=True).encode(),
        }
    )


def complete_tokenizer(tokenizer_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Have a tokenizer in both of its spellings, each made from the other where one is missing.

    ``tokenizer.json`` is what the ``tokenizers`` library alone can read; ``vocab.json`` with ``merges.txt`` is what
    transformers 4, and with it optimum, reads for the class ``CLIPTokenizer``.
    """
    if "tokenizer.json" not in tokenizer_files:
        return {**tokenizer_files, "tokenizer.json": _tokenizer_json(tokenizer_files)}
    if {"vocab.json", "merges.txt"} <= tokenizer_files.keys():
        return dict(tokenizer_files)
    return {**tokenizer_files, **_vocabulary_and_merges(tokenizer_files["tokenizer.json"])}


def _tokenizer_json(tokenizer_files: Mapping[str, bytes]) -> bytes:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in tokenizer_files.items():
            Path(folder, name).write_bytes(content)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    written: str = tokenizer.backend_tokenizer.to_str()
    return written.encode()


def _vocabulary_and_merges(tokenizer_json: bytes) -> dict[str, bytes]:
    """The two files of byte-pair encoding; none where the tokenizer is of another kind, which the runtime refuses."""
    model = json.loads(tokenizer_json).get("model", {})
    if not {"vocab", "merges"} <= model.keys():
        return {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, printable ones first, as CLIP and GPT-2 order them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
