"""How a UNet's engines fit together, by the names of their tensors alone.

A classic UNet takes the sample, the timestep and the conditions. Where work was hoisted out of it, engines beside it
(`HOISTED`) take the timestep and conditions, and some of its inputs are their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdc.engines.errors import BundleError
from sdc.engines.specs import HOISTED, ComponentSpec

SAMPLE, TIMESTEP = "sample", "timestep"
CONDITIONS = ("encoder_hidden_states", "timestep_cond")
"""Inputs that stay the same over all steps of a run."""

_GIVEN = frozenset({SAMPLE, TIMESTEP, *CONDITIONS})
"""Inputs that a UNet is given at every step; engines beside it are given all but the sample."""


def hoisted_parts(specs: Mapping[str, ComponentSpec]) -> tuple[ComponentSpec, ...]:
    """The engines beside the UNet."""
    return tuple(specs[name] for name in HOISTED if name in specs)


def changes_with_timestep(part: ComponentSpec) -> bool:
    """Whether a hoisted engine runs for every timestep, or else once for a run."""
    return any(tensor.name == TIMESTEP for tensor in part.inputs)


def check_wiring(specs: Mapping[str, ComponentSpec], *, place: str) -> None:
    """Check that all that the UNet and the engines beside it take is provided.

    Raises:
        BundleError: an input is neither the sample, the timestep, a condition nor an output of an engine beside the
            UNet, or that output is of another type or shape; or such an engine has no UNet.
    """
    parts = hoisted_parts(specs)
    if "unet" not in specs:
        if parts:
            raise BundleError(f"{place}: {parts[0].name} has no unet to serve", hint="export the bundle again")
        return
    provided = {tensor.name: (part.name, tensor) for part in parts for tensor in part.outputs}
    if len(provided) < sum(len(part.outputs) for part in parts):
        raise BundleError(f"{place}: two engines beside the UNet give one name", hint="export the bundle again")
    for taker in (specs["unet"], *parts):
        for tensor in taker.inputs:
            if taker.name == "unet" and tensor.name in provided:
                giver, given = provided[tensor.name]
                if (given.dtype, given.shape) != (tensor.dtype, tensor.shape):
                    raise BundleError(
                        f"{place}: unet takes {tensor.name} as {tensor.dtype} {list(tensor.shape)}, {giver} gives "
                        f"{given.dtype} {list(given.shape)}",
                        hint="export the bundle again",
                    )
            elif tensor.name not in (_GIVEN if taker.name == "unet" else _GIVEN - {SAMPLE}):
                raise BundleError(
                    f"{place}: nothing provides the input {tensor.name!r} of {taker.name}",
                    hint="export the bundle again, or use the version of sdc that wrote it",
                )
