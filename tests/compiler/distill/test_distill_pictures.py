"""What a distillation learns from: read as it stands, encoded once, refused with the place of the fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import write_grey_pictures
from PIL import Image

from sdc.compiler.distill.pictures import FolderPictures, Pictures, TinyPictures, encode_once
from sdc.compiler.load import load_checkpoint
from sdc.compiler.tiny.captions import COLOURS, GARMENTS, HELD_OUT
from sdc.engines.errors import InputError


@pytest.fixture
def copy(picture_folder: Path, tmp_path: Path) -> Path:
    """The folder of pictures, to be changed."""
    return Path(shutil.copytree(picture_folder, tmp_path / "copy"))


def encode(pictures: Pictures, model: Path, path: Path, lines: list[str]) -> torch.Tensor:
    vae = load_checkpoint(str(model)).vae()
    device = torch.device("cpu")
    return encode_once(pictures, vae, path, vae_digest="one", device=device, tell=lines.append).mean


def test_pictures_are_scaled_and_cut_around_their_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (255, 0, 51)  # the middle third
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "wide.png", "text": "a stripe"}\n\n')
    pictures = FolderPictures(tmp_path, size_px=(10, 10))
    assert [list(each) for each in pictures.captions] == [["a stripe"]]
    expected = torch.tensor([1.0, -1.0, -0.6]).reshape(1, 3, 1, 1).expand(1, 3, 10, 10)
    torch.testing.assert_close(pictures.read(0, 1)[..., 1:-1], expected[..., 1:-1], atol=2 / 255, rtol=0)


def test_latents_are_those_of_the_vae_and_are_encoded_once(picture_folder: Path, model: Path, tmp_path: Path) -> None:
    pictures = FolderPictures(picture_folder, size_px=(40, 48))
    lines: list[str] = []
    first = encode(pictures, model, tmp_path / "latents.safetensors", lines)
    assert first.shape == (7, 5, 10, 12)
    assert lines
    vae = load_checkpoint(str(model)).vae()
    with torch.no_grad():
        expected = vae.encode(pictures.read(4, 5)).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(first[4:5], expected, atol=1e-4, rtol=1e-4)  # another layout in memory
    lines.clear()
    assert torch.equal(encode(pictures, model, tmp_path / "latents.safetensors", lines), first)
    assert not lines, "encoded again"


def test_latents_of_other_pictures_are_not_taken(copy: Path, model: Path, tmp_path: Path) -> None:
    path, lines = tmp_path / "latents.safetensors", list[str]()
    encode(FolderPictures(copy, size_px=(40, 40)), model, path, lines)
    Image.new("RGB", (50, 50), "white").save(copy / "picture 3.png")
    changed = FolderPictures(copy, size_px=(40, 40))
    lines.clear()
    encode(changed, model, path, lines)
    assert lines, "the old latents were taken"


def test_the_digest_follows_captions_and_size(copy: Path) -> None:
    digests = {FolderPictures(copy, size_px=size).digest for size in ((40, 40), (40, 48))}
    path = copy / "metadata.jsonl"
    path.write_text(path.read_text().replace("number 2", "number two"))
    digests.add(FolderPictures(copy, size_px=(40, 40)).digest)
    assert len(digests) == 3


LINE = '{"file_name": "picture 0.png", "text": "a caption"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metadata.jsonl"),
        ("\n", "names no picture"),
        (f"{LINE}\nnot json", "line 2 is not JSON"),
        (f'{LINE}\n{{"file_name": "picture 1.png"}}', "line 2 has no text"),
        (f'{LINE}\n{{"file_name": "picture 1.png", "text": " "}}', "line 2 has no text"),
        ('{"text": "a caption"}', "line 1 has no file_name"),
        ("[1]", "line 1 has no file_name"),
        ('{"file_name": "gone.png", "text": "x"}', r"gone.png is named in metadata.jsonl but is not there"),
    ],
)
def test_faults_of_the_metadata_are_named(copy: Path, content: str | None, message: str) -> None:
    if content is None:
        (copy / "metadata.jsonl").unlink()
    else:
        (copy / "metadata.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        FolderPictures(copy, size_px=(40, 40))


def test_a_file_that_is_no_picture_is_named(copy: Path) -> None:
    (copy / "picture 5.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"picture 5.png cannot be read"):
        FolderPictures(copy, size_px=(40, 40)).read(5, 6)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere"):
        FolderPictures(tmp_path / "nowhere", size_px=(40, 40))


def test_pictures_of_tiny_are_captioned_by_what_they_show(tmp_path: Path) -> None:
    garments = np.arange(40, dtype=np.uint8) % 10
    write_grey_pictures(tmp_path, garments)
    pictures = TinyPictures(tmp_path, seed=0)
    assert len(pictures) == 40
    assert pictures.read(3, 10).shape == (7, 3, 32, 32)
    for index, captions in enumerate(pictures.captions):
        white = bool((pictures.read(index, index + 1)[..., 0, 0] == 1).all())
        assert len(set(captions)) == 4
        assert all(("white" if white else "black") in each for each in captions)
    held_out = dict(HELD_OUT)
    for garment, captions in zip(garments.tolist(), pictures.captions, strict=True):
        assert GARMENTS[garment] in captions[0]
        assert list(COLOURS)[held_out[garment]] not in captions[0]
    assert TinyPictures(tmp_path, seed=1).digest != pictures.digest == TinyPictures(tmp_path, seed=0).digest
    some = TinyPictures(tmp_path, seed=0, garments={2, 7}, count=6)
    assert all(("pullover", "sneaker")[index % 2] in each[0] for index, each in enumerate(some.captions))
    assert len(some) == 6
    assert some.digest != pictures.digest
