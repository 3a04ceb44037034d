"""A small network, and passes that are broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.passes.base import Pass, PassReport

SIDE = DimensionRange(4, 6, 16)


SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("B", 3, "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", ("B", 5, 7)),
    ),
    (TensorSpec("out_sample", "float32", ("B", 3, "H", "W")),),
    {"B": DimensionRange(1, 2, 4), "H": SIDE, "W": SIDE},
)


@dataclass(frozen=True)
class ChangeEpsilon(Pass):
    """Broken: norms forget their epsilon."""

    name: ClassVar[str] = "change-epsilon"

    def rewrite(self, model: ir.Model) -> PassReport:
        for node in model.graph:
            if node.op_type == "GroupNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.3)
        return PassReport(self.name, 1)


@dataclass(frozen=True)
class ForgetInput(Pass):
    """Broken: the graph is not valid afterwards."""

    name: ClassVar[str] = "forget-input"

    def rewrite(self, model: ir.Model) -> PassReport:
        node = next(node for node in model.graph if node.op_type == "Conv")
        node.replace_input_with(1, None)
        return PassReport(self.name, 1)


@dataclass(frozen=True)
class Refuse(Pass):
    """A pass that cannot do its work."""

    name: ClassVar[str] = "refuse"

    def rewrite(self, model: ir.Model) -> PassReport:  # noqa: ARG002
        raise PassError("nothing of the kind here")


@dataclass(frozen=True)
class Rename(Pass):
    """Changes names and nothing else."""

    name: ClassVar[str] = "rename"

    def rewrite(self, model: ir.Model) -> PassReport:
        for index, node in enumerate(model.graph):
            node.name = f"other_{index}"
            for value in node.outputs:
                if not value.is_graph_output():
                    value.name = f"other_value_{index}"
        return PassReport(self.name, 1)
