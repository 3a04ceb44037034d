"""Group normalisation of our own kernels inside of an OpenVINO model.

What is normalised lies between convolutions, which keep channels last, but OpenVINO's normalisation wants them first:
images are reordered in front of it and behind it. All of::

    y = activation(Reshape(MVN(Reshape(x + addend, [0, groups, -1]), axis 2), [B, C, H, W]) · weight + bias)

with the affine maps before and behind the second Reshape, with SiLU as the activation or none, and the addend, of
[B, C, 1, 1], where there is one, becomes one operator on channels last::

    y = Transpose(Convert(KernelGroupNorm(Convert(Transpose(x, [0, 2, 3, 1]), bf16), Convert(addend, bf16)), type of y),
                  [0, 3, 1, 2])

The transposes cost nothing: the plugin sees that they are how the images lie already.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.engines.kernels.library import Affine, Kernels, Rows
from sdc.engines.sessions.openvino_operators import (
    KernelOperator,
    Replacements,
    constant_of,
    sole_reader,
    static_shapes,
)

log = logging.getLogger(__name__)

_LEAST_ELEMENTS = 100_000


@dataclass(frozen=True)
class Settings:
    """A normalisation without its operands; see `Kernels.normalise_groups`."""

    affine: Affine
    groups: int
    epsilon: float
    silu: bool


@dataclass(frozen=True)
class _Site:
    """One normalisation in a model.

    Attributes:
        normalised: images + addend, or the images; an output of a node, [B, C, H, W].
        images: likewise.
        addend: [B or 1, C, 1, 1]; None for none.
        result: the last node of the pattern; its output is what the operator's takes the place of.
        settings: what is computed.
    """

    normalised: Any
    images: Any
    addend: Any | None
    result: Any
    settings: Settings


class KernelGroupNorm(KernelOperator):
    """images: [B, H, W, C], bf16; addend: [B or 1, C, 1, 1], bf16, or not there → normalised, as the images.

    Attributes:
        settings: what is computed.
    """

    def __init__(self, settings: Settings, kernels: Kernels, replacements: Replacements, inputs: list[Any]) -> None:
        self.settings = settings
        self._kernels = kernels
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelGroupNorm:
        """Another one of the same settings."""
        return KernelGroupNorm(self.settings, self._kernels, self.replacements, inputs)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        images, *addends = (tensor.data for tensor in inputs)
        batch, height, width, channels = images.shape
        outputs[0].shape = [batch, height, width, channels]
        shape = (batch, height * width, channels)
        settings = self.settings
        self._kernels.normalise_groups(
            Rows(images.ctypes.data, shape),
            Rows(outputs[0].data.ctypes.data, shape),
            settings.affine,
            groups=settings.groups,
            epsilon=settings.epsilon,
            silu=settings.silu,
            addend=_rows_of(addends[0]) if addends else None,
        )
        return True


def replace_group_norms(
    model: openvino.Model, kernels: Kernels, shapes: Mapping[str, tuple[int, ...]], replacements: Replacements
) -> None:
    """Put the kernel in the place of every group normalisation that it computes faster.

    Args:
        model: changed in place; it has to be compiled for bf16.
        kernels: loaded.
        shapes: of the inputs by name, with which small normalisations are told.
        replacements: to which the operators are added.
    """
    candidates = [node for node in model.get_ordered_ops() if node.get_type_name() == "MVN"]
    if not candidates:
        return
    with static_shapes(model, shapes):
        found = [(site, _elements(site.images)) for node in candidates if (site := _match(node)) is not None]
    sites = [site for site, elements in found if elements >= _LEAST_ELEMENTS]
    for site in sites:
        _replace(site, kernels, replacements)
    log.info("%d of %d group normalisations run in the CPU kernels", len(sites), len(found))


def _replace(site: _Site, kernels: Kernels, replacements: Replacements) -> None:
    for port in _readers_of_shape(site.normalised):
        port.replace_source_output(site.images)  # so that nothing needs the sum any more
    inputs = [operators.convert(operators.transpose(site.images, [0, 2, 3, 1]), "bf16")]
    if site.addend is not None:
        inputs.append(operators.convert(site.addend, "bf16"))
    norm = KernelGroupNorm(site.settings, kernels, replacements, [node.output(0) for node in inputs])
    element_type = site.result.get_output_element_type(0).to_string()
    whole = operators.transpose(operators.convert(norm, element_type), [0, 3, 1, 2])
    whole.set_friendly_name(site.result.get_friendly_name())
    site.result.output(0).replace(whole.output(0))


def _rows_of(addend: np.ndarray) -> Rows:
    """[B, C, 1, 1] as [B, 1, C]."""
    batch, channels, height, width = addend.shape
    return Rows(addend.ctypes.data, (batch, height * width, channels))


def _readers_of_shape(value: Any) -> list[Any]:
    """The inputs of nodes that read a value's shape only."""
    return [port for port in value.get_target_inputs() if port.get_node().get_type_name() == "ShapeOf"]


def _elements(value: Any) -> int:
    return math.prod(value.get_shape())


def _match(mvn: Any) -> _Site | None:
    """The pattern around an MVN, or None if it is another. All shapes are static."""
    attributes = mvn.get_attributes()
    axes = constant_of(mvn.input_value(1))
    if not attributes["normalize_variance"] or attributes["eps_mode"].upper() != "INSIDE_SQRT" or axes is None:
        return None
    grouped = mvn.input_value(0)
    reshape = grouped.get_node()
    if reshape.get_type_name() != "Reshape" or sole_reader(grouped) is None or axes.tolist() not in ([2], [-1]):
        return None
    images = reshape.input_value(0)
    if len(images.get_shape()) != 4 or len(grouped.get_shape()) != 3:
        return None
    batch, channels = images.get_shape()[:2]
    groups = grouped.get_shape()[1]
    if grouped.get_shape()[0] != batch or channels % groups != 0:
        return None
    chain = _Chain(mvn.output(0), channels, groups)
    chain.follow(tuple(images.get_shape()))
    if not chain.is_complete:
        return None
    result, silu = _after_silu(chain.value)
    affine = Affine(chain.weight.astype(np.float32), chain.bias.astype(np.float32))
    return _Site(images, *_before_addend(images), result, Settings(affine, groups, float(attributes["eps"]), silu))


class _Chain:
    """The affine maps behind a normalisation, which are joined to one as they are followed.

    Attributes:
        value: the output that was reached.
        is_complete: whether it has the shape of the images.
        weight: float64, [channels]; likewise bias.
    """

    def __init__(self, value: Any, channels: int, groups: int) -> None:
        self.value = value
        self.is_complete = False
        self._channels, self._groups = channels, groups
        self.weight, self.bias = np.ones(channels), np.zeros(channels)

    def follow(self, shape: tuple[int, ...]) -> None:
        """Go as far as maps go; `shape` is the images'."""
        while (node := sole_reader(self.value)) is not None and self._take(node, shape):
            self.value = node.output(0)

    def _take(self, node: Any, shape: tuple[int, ...]) -> bool:
        """Join one node; whether it is one of the maps."""
        kind = node.get_type_name()
        if kind == "Reshape" and not self.is_complete:
            self.is_complete = tuple(node.get_output_shape(0)) == shape
            return self.is_complete
        if kind == "BatchNormInference" and self.is_complete:
            return self._take_batch_norm(node)
        if kind in ("Multiply", "Add"):
            operand = next((port for port in node.input_values() if port != self.value), None)
            constant = None if operand is None else self._per_channel(constant_of(operand))
            if constant is None:
                return False
            if kind == "Multiply":
                self.weight, self.bias = self.weight * constant, self.bias * constant
            else:
                self.bias = self.bias + constant
            return True
        return False

    def _take_batch_norm(self, node: Any) -> bool:
        constants = [constant_of(port) for port in node.input_values()[1:]]
        if node.input_value(0) != self.value or any(constant is None for constant in constants):
            return False
        weight, bias, mean, variance = (np.asarray(constant, np.float64) for constant in constants)
        factor = weight / np.sqrt(variance + node.get_attributes()["epsilon"])
        self.weight, self.bias = self.weight * factor, (self.bias - mean) * factor + bias
        return True

    def _per_channel(self, constant: np.ndarray | None) -> np.ndarray | None:
        """One value for each channel, if that is how the constant is broadcast."""
        if constant is None:
            return None
        if constant.size == 1:
            return np.full(self._channels, float(constant.reshape(())))
        count, shape = (self._channels, (1, 1)) if self.is_complete else (self._groups, (1,))
        if constant.shape not in ((count, *shape), (1, count, *shape)):
            return None
        return np.repeat(constant.reshape(count).astype(np.float64), self._channels // count)


def _after_silu(value: Any) -> tuple[Any, bool]:
    """The Multiply of value · Sigmoid(value) and true if nothing else reads the value; otherwise its node and false."""
    readers = [port.get_node() for port in value.get_target_inputs()]
    kinds = {reader.get_type_name(): reader for reader in readers}
    if len(readers) == 2 and set(kinds) == {"Sigmoid", "Multiply"}:
        product = sole_reader(kinds["Sigmoid"].output(0))
        if product is not None and product.get_friendly_name() == kinds["Multiply"].get_friendly_name():
            return product, True
    return value.get_node(), False


def _before_addend(images: Any) -> tuple[Any, Any | None]:
    """x and the addend of x + addend if only the normalisation reads the sum; otherwise what was given, and None."""
    node = images.get_node()
    others = len(images.get_target_inputs()) - len(_readers_of_shape(images)) - 1
    if node.get_type_name() != "Add" or others:
        return images, None
    for summand, addend in (node.input_values(), node.input_values()[::-1]):
        shape, broadcast = tuple(summand.get_shape()), tuple(addend.get_shape())
        if shape == tuple(images.get_shape()) and broadcast in {(1, shape[1], 1, 1), (shape[0], shape[1], 1, 1)}:
            # A constant is a convolution's bias, which OpenVINO adds in the convolution.
            return (images, None) if constant_of(addend) is not None else (summand, addend)
    return images, None
