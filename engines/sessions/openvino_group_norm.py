"""Group normalisation of our own kernels inside of an OpenVINO model.

What is normalised lies between convolutions, which keep channels last, but OpenVINO's normalisation wants them first:
images are reordered in front of it and behind it. All of::

    x = images + addend
    y = activation(Reshape(MVN(Reshape(x, [0, groups, -1]), axis 2), [B, C, H, W]) · weight + bias)

with the affine maps before and behind the second Reshape, and with SiLU as the activation or none, becomes one operator
on channels last::

    y = first(KernelGroupNorm(last(images), Convert(addend, bf16)))
    last(x) = Convert(Transpose(x, [0, 2, 3, 1]), bf16);  first(x) = Transpose(Convert(x, type of y), [0, 3, 1, 2])

The addend, [B, C, 1, 1], may be missing, or be images too, as in residual networks: then x is the second output. The
transposes cost nothing, as the plugin sees that images lie so already. It does not where a convolution adds images to
its result; that is why such sums are computed here.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

from sdc.engines.kernels.library import Affine, Kernels
from sdc.engines.kernels.rows import Rows
from sdc.engines.sessions.openvino_layout import channels_last, put_in_place_of, rows_of
from sdc.engines.sessions.openvino_operators import (
    KernelOperator,
    Replacements,
    constant_of,
    sole_reader,
    static_shapes,
)

log = logging.getLogger(__name__)

_LEAST_ELEMENTS = 100_000
"""The smallest that were measured, 164,000 elements, take 0.25 ms, of which some 0.1 ms are Python's and OpenVINO's."""


@dataclass(frozen=True)
class Settings:
    """A normalisation without its operands; see `Kernels.normalise_groups`."""

    affine: Affine
    groups: int
    epsilon: float
    silu: bool


class Sum(enum.Enum):
    """What is added to images before they are normalised."""

    NOTHING = enum.auto()
    ADDEND = enum.auto()
    """[B or 1, C, 1, 1]; nothing else reads the sum."""
    IMAGES = enum.auto()
    """[B, C, H, W]."""


@dataclass(frozen=True)
class _Site:
    """One normalisation in a model.

    Attributes:
        reshape: the node that forms the groups.
        add: the node before it if there is a sum, otherwise the same one.
        order: of the operands of `add`, images first.
        sum: of which kind.
        result: the last node of the pattern; its output is what the operator's takes the place of.
        settings: what is computed.
    """

    reshape: Any
    add: Any
    order: tuple[int, ...]
    sum: Sum
    result: Any
    settings: Settings


class KernelGroupNorm(KernelOperator):
    """images: [B, H, W, C], bf16 → normalised, as the images.

    With an addend, [B or 1, C, 1, 1] in bf16, as the second input; or with other images, of which the sum is the second
    output.

    Attributes:
        settings: what is computed.
        sum: what the second input is.
    """

    def __init__(
        self, settings: Settings, sum_: Sum, kernels: Kernels, replacements: Replacements, inputs: list[Any]
    ) -> None:
        self.settings, self.sum = settings, sum_
        self._kernels = kernels
        super().__init__(replacements, inputs)

    def copy(self, inputs: list[Any]) -> KernelGroupNorm:
        """Another one of the same settings."""
        return KernelGroupNorm(self.settings, self.sum, self._kernels, self.replacements, inputs)

    def validate_and_infer_types(self) -> None:
        """Both outputs are like the first input."""
        super().validate_and_infer_types()
        if self.sum is Sum.IMAGES:
            self.set_output_type(1, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""
        images, *others = (tensor.data for tensor in inputs)
        for output in outputs:
            output.shape = list(images.shape)
        arrays = (images, *(output.data for output in outputs), *(others if self.sum is Sum.IMAGES else ()))
        rows, normalised, *summand = (rows_of(array) for array in arrays)
        settings = self.settings
        self._kernels.normalise_groups(
            rows,
            normalised,
            settings.affine,
            groups=settings.groups,
            epsilon=settings.epsilon,
            silu=settings.silu,
            addend=_row_of(others[0]) if self.sum is Sum.ADDEND else None,
            summand=(summand[1], summand[0]) if summand else None,
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
    found, sites = _sites(model, shapes)
    for site in sites:
        _replace(site, kernels, replacements)
    if found:
        log.info("%d of %d group normalisations run in the CPU kernels", len(sites), found)


def sums_taken(model: openvino.Model, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of tensors that are sums of images which `replace_group_norms` has the kernel compute."""
    _, sites = _sites(model, shapes)
    names = [site.add.output(0).get_names() for site in sites if site.sum is Sum.IMAGES]
    return frozenset[str]().union(*names)


def _sites(model: openvino.Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, list[_Site]]:
    """How many group normalisations there are, and those that are large enough."""
    candidates = [node for node in model.get_ordered_ops() if node.get_type_name() == "MVN"]
    if not candidates:
        return 0, []
    with static_shapes(model, shapes):
        found = [
            (site, math.prod(site.reshape.get_input_shape(0)))
            for node in candidates
            if (site := _match(node)) is not None
        ]
    return len(found), [_without_broadcasts(site) for site, elements in found if elements >= _LEAST_ELEMENTS]


def _without_broadcasts(site: _Site) -> _Site:
    """With the sum left out that is one of images of equal sizes in `shapes` only, as a free batch may be 1 there."""
    batches = [site.add.input_value(index).get_partial_shape()[0] for index in site.order]
    if site.sum is Sum.IMAGES and batches[0].is_static != batches[1].is_static:
        return dataclasses.replace(site, add=site.reshape, order=(0,), sum=Sum.NOTHING)
    return site


def _replace(site: _Site, kernels: Kernels, replacements: Replacements) -> None:
    images, *others = (site.add.input_value(index) for index in site.order)
    inputs = [channels_last(images)]
    if site.sum is Sum.ADDEND:
        inputs.append(operators.convert(others[0], "bf16").output(0))
    elif site.sum is Sum.IMAGES:
        inputs.append(channels_last(others[0]))
    norm = KernelGroupNorm(site.settings, site.sum, kernels, replacements, inputs)
    if site.sum is not Sum.NOTHING:
        total = site.add.output(0)
        for port in _readers_of_shape(total):
            port.replace_source_output(images)  # so that nothing needs the sum for that
        if site.sum is Sum.IMAGES:
            put_in_place_of(total, norm.output(1))
    put_in_place_of(site.result.output(0), norm.output(0))


def _row_of(addend: np.ndarray) -> Rows:
    """[B, C, 1, 1] as [B, 1, C]."""
    batch, channels, height, width = addend.shape
    return Rows(addend.ctypes.data, (batch, height * width, channels))


def _readers_of_shape(value: Any) -> list[Any]:
    """The inputs of nodes that read a value's shape only."""
    return [port for port in value.get_target_inputs() if port.get_node().get_type_name() == "ShapeOf"]


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
    return _Site(reshape, *_before_sum(reshape), result, Settings(affine, groups, float(attributes["eps"]), silu))


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


def _before_sum(reshape: Any) -> tuple[Any, tuple[int, ...], Sum]:
    """The node that adds what is normalised, the order of its operands, and of which kind the sum is; see `_Site`."""
    nothing = (reshape, (0,), Sum.NOTHING)
    total = reshape.input_value(0)
    node = total.get_node()
    if node.get_type_name() != "Add" or any(constant_of(value) is not None for value in node.input_values()):
        return nothing  # a constant is a convolution's bias, which OpenVINO adds in the convolution
    shape = tuple(total.get_shape())
    shapes = [tuple(value.get_shape()) for value in node.input_values()]
    if shapes == [shape, shape]:
        return node, (0, 1), Sum.IMAGES
    others = len(total.get_target_inputs()) - len(_readers_of_shape(total)) - 1
    order = (0, 1) if shapes[0] == shape else (1, 0)
    if others or shapes[order[1]] not in {(1, shape[1], 1, 1), (shape[0], shape[1], 1, 1)}:
        return nothing
    return node, order, Sum.ADDEND
