"""Trains a tokenizer in CLIP's own format on the captions of `tiny`.

Source: Radford et al., arXiv:2103.00020: byte-level BPE, lower case, words end in ``</w>``; the vocabulary is the 256
bytes, the 256 bytes that end a word, the merges, and the two special tokens, in this order.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
MAX_TOKENS = 77


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn merges until every word of the captions is one token, and save the tokenizer's files in `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(Counter(word for caption in captions for word in _words(caption)))
    tokens = [*alphabet, *(letter + SUFFIX for letter in alphabet), *("".join(merge) for merge in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _words(caption: str) -> list[str]:
    return caption.lower().replace(",", " , ").replace("-", " - ").split()


def _learn_merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909, algorithm 1); ties go to the first pair in order."""
    words = {(*word[:-1], word[-1] + SUFFIX): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for letters, count in words.items():
            for pair in pairwise(letters):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(letters, best): count for letters, count in words.items()}


def _merge(letters: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(letters):
        if letters[i : i + 2] == pair:
            merged.append(letters[i] + letters[i + 1])
            i += 2
        else:
            merged.append(letters[i])
            i += 1
    return tuple(merged)
