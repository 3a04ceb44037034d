"""Fuse the change between images and token sequences around transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import dimensions, is_operator, replace_nodes, same_size, site, sole_consumer

_CHANNELS_LAST = [0, 2, 3, 1]
_CHANNELS_FIRST = [0, 3, 1, 2]
_SWAPPED = [0, 2, 1]


@dataclass(frozen=True)
class FuseTokens(Pass):
    """[B, C, H, W] ↔ [B, H * W, C] is one node each way, without arithmetic on sizes.

    Before → after, with x: [B, C, H, W], t: [B, S, C]::

        Reshape(Transpose(x, [0, 2, 3, 1]), [B, S, C])  →  sdc.TokensFromImage(x)
        Transpose(Reshape(x, [B, C, S]), [0, 2, 1])     →  sdc.TokensFromImage(x)
        Transpose(Reshape(t, [B, H, W, C]), [0, 3, 1, 2])  →  sdc.ImageFromTokens(t, like)
        Reshape(Transpose(t, [0, 2, 1]), [B, C, H, W])     →  sdc.ImageFromTokens(t, like)

    ``like`` is the nearest image before it of the same height and width that was turned into tokens.

    Preconditions:

    1. Nothing reads what stands between Reshape and Transpose.
    2. The shapes on both sides are known to agree in batch and in the number of channels, which is static: the sizes
       that are left are then equal as a product.
    3. Back to an image: its height and width are known (a number or a symbol), and an image of this size has been
       turned into tokens before.

    Not matched: other orders of axes; a norm between Reshape and Transpose.
    """

    name: ClassVar[str] = "fuse-tokens"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Fuse all sites; the details count the two directions."""
        counts = {"tokens_from_image": 0, "image_from_tokens": 0}
        skipped: list[Skipped] = []
        images: list[ir.Value] = [
            value
            for node in model.graph
            if domain.is_fused(node, domain.TOKENS_FROM_IMAGE) and (value := node.inputs[0]) is not None
        ]
        for node in list(model.graph):
            pair = _pair(node)
            if pair is None:
                continue
            x, y = node.inputs[0], pair.outputs[0]
            assert x is not None
            if _is_tokens_from_image(node, x, y):
                shape = dimensions(y)
                assert shape is not None
                fused = ir.node(domain.TOKENS_FROM_IMAGE, [x], {"channels": shape[2]}, domain=domain.DOMAIN)
                images.append(x)
                counts["tokens_from_image"] += 1
            elif _is_image_from_tokens(node, x, y):
                like = next((image for image in reversed(images) if _same_plane(image, y)), None)
                if like is None:
                    skipped.append(Skipped(site(node), f"no image of size {dimensions(y)} was turned into tokens"))
                    continue
                fused = ir.node(domain.IMAGE_FROM_TOKENS, [x, like], domain=domain.DOMAIN)
                counts["image_from_tokens"] += 1
            else:
                continue
            replace_nodes([node, pair], fused, pair.outputs, at=pair)
            domain.import_operator(model, fused.op_type)
        return PassReport(name=self.name, matched=sum(counts.values()), skipped=tuple(skipped), details=dict(counts))


def _pair(node: ir.Node) -> ir.Node | None:
    """The Transpose behind a Reshape or the Reshape behind a Transpose, if it is the only reader."""
    expected = {"Reshape": "Transpose", "Transpose": "Reshape"}.get(node.op_type)
    reader = None if expected is None or node.domain else sole_consumer(node.outputs[0])
    if reader is None or not is_operator(reader, expected or "") or reader.inputs[0] is not node.outputs[0]:
        return None
    return reader


def _order(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []


def _is_tokens_from_image(first: ir.Node, x: ir.Value, y: ir.Value) -> bool:
    image, tokens = dimensions(x), dimensions(y)
    middle = dimensions(first.outputs[0])
    if image is None or tokens is None or middle is None or (len(image), len(tokens)) != (4, 3):
        return False
    if not same_size(image[0], tokens[0]) or not isinstance(image[1], int) or image[1] != tokens[2]:
        return False
    if is_operator(first, "Transpose"):
        return _order(first) == _CHANNELS_LAST
    (second,) = first.outputs[0].consumers()
    return _order(second) == _SWAPPED and same_size(middle[0], image[0]) and middle[1] == image[1]


def _is_image_from_tokens(first: ir.Node, x: ir.Value, y: ir.Value) -> bool:
    tokens, image = dimensions(x), dimensions(y)
    middle = dimensions(first.outputs[0])
    if tokens is None or image is None or middle is None or (len(tokens), len(image)) != (3, 4):
        return False
    if not same_size(tokens[0], image[0]) or not isinstance(tokens[2], int) or tokens[2] != image[1]:
        return False
    if is_operator(first, "Transpose"):
        return _order(first) == _SWAPPED
    (second,) = first.outputs[0].consumers()
    return _order(second) == _CHANNELS_FIRST and same_size(middle[0], tokens[0]) and middle[3] == tokens[2]


def _same_plane(image: ir.Value, other: ir.Value) -> bool:
    a, b = dimensions(image), dimensions(other)
    return a is not None and b is not None and len(a) == len(b) == 4 and all(map(same_size, a[2:], b[2:]))
