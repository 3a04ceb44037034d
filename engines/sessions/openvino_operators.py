"""Operators of our own inside of OpenVINO models, in Python around the CPU kernels, and how models are searched.

Such an operator cannot be saved in a model, therefore models are patched after they are read.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operators

_numbers = itertools.count()

_SMALL_BYTES = 1 << 16
"""More than a bias has in any of the networks, and less than a weight that is worth packing."""

_EXPONENT = 0x7F80
"""Of bf16; with all of its bits a number is not finite."""


class Replacements:
    """The operators that were put into one model, and their copies in what is compiled from it.

    OpenVINO never frees an operator that is written in Python, nor what it reads: the whole graph before it. So all of
    them are kept here, to be cut off from their inputs at the end. And OpenVINO copies an operator whenever it infers
    shapes, which is in every run; once the model is compiled, one copy of each serves for that.
    """

    def __init__(self) -> None:
        self.operators: list[KernelOperator] = []
        self.compiled = False

    def release(self) -> None:
        """Cut the operators off from the graph; what was compiled from the model must not be used any more."""
        for operator in self.operators:
            operator.release()
        self.operators.clear()


class KernelOperator(openvino.Op):  # type: ignore[misc]  # openvino has no types: its classes are Any
    """One whose output has the type and the shape of its first input.

    Attributes:
        replacements: of its model.
    """

    def __init__(self, replacements: Replacements, inputs: list[Any]) -> None:
        super().__init__(self)
        self.replacements = replacements
        self._number = next(_numbers)
        self._for_shapes: KernelOperator | None = None
        replacements.operators.append(self)
        self.read(inputs)

    @abstractmethod
    def copy(self, inputs: list[Any]) -> KernelOperator:
        """Another one of the same settings that reads these outputs of nodes."""

    @abstractmethod
    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Run the kernel on the tensors' own memory."""

    def read(self, inputs: list[Any]) -> None:
        """Take the inputs from elsewhere."""
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()

    def release(self) -> None:
        """Read nothing any more; it cannot run from then on."""
        self.set_arguments([])

    def validate_and_infer_types(self) -> None:
        """The output is like the first input."""
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: list[Any]) -> KernelOperator:
        """A copy with other inputs; of a compiled model always the same one."""
        if self._for_shapes is not None:
            self._for_shapes.read(list(new_inputs))
            return self._for_shapes
        copy = self.copy(list(new_inputs))
        if self.replacements.compiled:
            self._for_shapes = copy
        return copy

    def visit_attributes(self, visitor: Any) -> bool:
        """Nothing of it can be saved. A number tells it apart, as OpenVINO joins what is alike and reads the same."""
        visitor.on_attributes({"number": self._number})
        return True

    def has_evaluate(self) -> bool:
        """It computes itself."""
        return True


@contextlib.contextmanager
def static_shapes(model: openvino.Model, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Within, all shapes are those that inputs of these shapes lead to.

    Args:
        model: its inputs' shapes are restored at the end.
        shapes: by name of the input.
    """
    free = {port.get_any_name(): port.get_partial_shape() for port in model.inputs}
    model.reshape({name: list(shapes[name]) for name in free})
    try:
        yield
    finally:
        model.reshape(free)


def sole_reader(value: Any) -> Any | None:
    """The node that reads an output; None if there are several or none."""
    readers = [port.get_node() for port in value.get_target_inputs()]
    return readers[0] if len(readers) == 1 else None


def constant_of(value: Any) -> np.ndarray | None:
    """A constant, behind conversions of its type or not, in float32 or int64; None for anything else."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "ConvertLike"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    # `data` would show bf16 as f16.
    return np.asarray(node.get_data(dtype=np.float32 if node.get_output_element_type(0).is_real() else np.int64))


def round_constants(model: openvino.Model) -> None:
    """Round what is converted to bf16 from constants of float32 to the nearest: OpenVINO would cut bits off.

    What is not finite, or would not be, is cut all the same.
    """
    for node in model.get_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "Convert" else None
        if (
            source is not None
            and source.get_type_name() == "Constant"
            and source.get_element_type() == openvino.Type.f32
            and node.get_element_type() == openvino.Type.bf16
        ):
            bits = source.data.view(np.uint32)
            rounded = openvino.Tensor(openvino.Type.bf16, list(source.shape))
            nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
            is_finite = nearest & _EXPONENT != _EXPONENT
            rounded.data.view(np.uint16)[...] = np.where(np.isfinite(source.data) & is_finite, nearest, bits >> 16)
            node.output(0).replace(operators.constant(rounded).output(0))


def copy_small_constants(model: openvino.Model) -> None:
    """Take constants in floating point that are read at every run, biases and scales, out of the mapped file.

    Weights are packed into other memory, and their pages let go of. A bias beside them would bring pages back: 2 MB
    each, where the system's cache holds the file in large ones.
    """
    for node in model.get_ops():
        if (
            node.get_type_name() == "Constant"
            and node.get_element_type().is_real()
            and 0 < node.get_byte_size() < _SMALL_BYTES
        ):
            copied = openvino.Tensor(node.get_element_type(), list(node.shape))
            node.get_tensor_view().copy_to(copied)
            held = operators.constant(copied)  # of the tensor's own memory
            held.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(held.output(0))
