"""Token ids against transformers' CLIPTokenizer, from each of the file sets that models ship."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch_pipeline import CAPTIONS
from transformers import CLIPTokenizer

from sdc.compiler.tiny.train_tokenizer import train_tokenizer
from sdc.engines.errors import InputError
from sdc.engines.tokenizer import load_tokenizer

NASTY = [
    "",
    " ",
    "a photo of a red sneaker on a white background",
    "A PHOTO  of\ta\n\nRED   sneaker ,on a-white_background!!!",
    "it's we're they've I'm he'll she'd don't 'tis rock'n'roll '' 's's",
    "1girl 3.14 2026-11-22 ½ ² Ⅷ ٣٤ 100%",
    "naïve café Ångström Ångström İstanbul ẞ ſ ﬁ",
    "日本語のスニーカー 红色的鞋 빨간 신발 красный ботинок χρώμα",
    "👟 👩‍👩‍👧‍👦 🇫🇷 ❤️ \U0001f9ff",
    "(red:1.2) [blue|green] {a, b} <lora:x:0.8> \\(escaped\\) a::b",
    "zero\u200bwidth\u00a0space\u3000wide\u2028line\u0085next",
    "control\x00\x01\x1b[31m tab\tbell\x07",
    "a red<|endoftext|>sneaker <|startoftext|> bag<|EndOfText|>",
    "!!! ! wow! !a!",
    "<concept> my<concept>style <CONCEPT>",
    "e\u0301 a\u0308 \ufeffbom",
    "x" * 50,
    "'" * 20,
    "a red sneaker " * 40,
]

MATCHING = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

SD15_SPECIAL = {
    "bos_token": {"content": "<|startoftext|>", **MATCHING},
    "eos_token": {"content": "<|endoftext|>", **MATCHING},
    "pad_token": "<|endoftext|>",
    "unk_token": {"content": "<|endoftext|>", **MATCHING},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(CAPTIONS, folder)
    return folder


def make_folder(kind: str, trained: Path, folder: Path) -> Path:
    """A tokenizer folder as a family of models ships it."""
    if kind == "tokenizer.json":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(trained / name, folder)
        return folder
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(trained / name, folder)
    if kind == "bare":
        return folder
    vocabulary = json.loads((folder / "vocab.json").read_text())
    special = {**SD15_SPECIAL, "pad_token": "!"} if kind == "sd2" else SD15_SPECIAL
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    if kind == "added tokens":
        (folder / "added_tokens.json").write_text(json.dumps({"<concept>": len(vocabulary)}))
    if kind == "decoder":
        rules = {**MATCHING, "normalized": False, "special": True}
        names = ("!", "<|startoftext|>", "<|endoftext|>")
        config["added_tokens_decoder"] = {str(vocabulary[name]): {"content": name, **rules} for name in names}
        config["pad_token"] = "!"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["tokenizer.json", "bare", "sd15", "sd2", "added tokens", "decoder"])
def test_ids_equal_transformers(kind: str, trained: Path, tmp_path: Path) -> None:
    folder = make_folder(kind, trained, tmp_path)
    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = theirs(NASTY, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    found = load_tokenizer(folder).encode(NASTY)
    assert found.dtype == np.int64
    for text, mine, reference in zip(NASTY, found.tolist(), expected.tolist(), strict=True):
        assert mine == reference, repr(text)


@pytest.mark.parametrize(("kind", "pad"), [("sd15", "<|endoftext|>"), ("sd2", "!")])
def test_padding_comes_from_the_files(kind: str, pad: str, trained: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((trained / "vocab.json").read_text())
    row = load_tokenizer(make_folder(kind, trained, tmp_path)).encode(["red"])[0]
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert row.tolist() == [start, vocabulary["red</w>"], end] + [vocabulary[pad]] * 74


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_the_rest(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(trained)
    fits = "red " * 74 + "Bag"
    with caplog.at_level(logging.WARNING):
        whole = tokenizer.encode([fits])
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        cut = tokenizer.encode([f"{fits}  and Ünïcode, too"])
    np.testing.assert_array_equal(cut, whole)
    assert "more than 75 tokens; 16 characters were cut: 'and Ünïcode, too'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenizer.encode([f"{fits} {'pink bag ' * 9}"])
    assert "81 characters were cut: 'pink bag pink bag pink bag pink bag pink…'" in caplog.text


def test_shorter_contexts(trained: Path) -> None:
    row = load_tokenizer(trained, max_tokens=5).encode(["red bag red bag red bag"])[0]
    assert row.tolist() == load_tokenizer(trained).encode(["red bag red"])[0, :5].tolist()


def test_missing_and_foreign_files_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer in .* cannot be read: .*No such file.*; it needs"):
        load_tokenizer(tmp_path)
    whole = json.loads((trained / "tokenizer.json").read_text())
    whole["model"]["end_of_word_suffix"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="expected byte-pair encoding"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
