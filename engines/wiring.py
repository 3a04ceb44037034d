"""How a UNet's engines fit together, by the names of their tensors alone.

A classic UNet takes the sample, the timestep and the conditions. Where work was hoisted out of it, engines beside it
(`HOISTED`) take the timestep and conditions, and some of its inputs are their outputs. The shallow UNet of DeepCache
(`SHALLOW`) takes some of the UNet's inputs, and outputs that the UNet has beside its prediction.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdc.engines.errors import BundleError
from sdc.engines.specs import HOISTED, SHALLOW, ComponentSpec

SAMPLE, TIMESTEP = "sample", "timestep"
PREDICTION = "out_sample"
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
            UNet, or that output is of another type or shape; or such an engine has no UNet; or a shallow UNet does not
            fit the whole one.
    """
    parts = hoisted_parts(specs)
    if "unet" not in specs:
        lonely = [name for name in (*HOISTED, SHALLOW) if name in specs]
        if lonely:
            raise BundleError(f"{place}: {lonely[0]} has no unet to serve", hint="export the bundle again")
        return
    if SHALLOW in specs:
        _check_shallow(specs["unet"], specs[SHALLOW], place)
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


def cached_tensors(unet: ComponentSpec, shallow: ComponentSpec) -> tuple[str, ...]:
    """What the shallow UNet takes of the whole one's outputs, by name."""
    given = {tensor.name for tensor in unet.outputs}
    return tuple(tensor.name for tensor in shallow.inputs if tensor.name in given)


def _check_shallow(unet: ComponentSpec, shallow: ComponentSpec, place: str) -> None:
    hint = "export the bundle again"
    available = {tensor.name: tensor for tensor in (*unet.inputs, *unet.outputs) if tensor.name != PREDICTION}
    for tensor in shallow.inputs:
        if tensor.name not in available:
            raise BundleError(f"{place}: nothing provides the input {tensor.name!r} of {shallow.name}", hint=hint)
        found = available[tensor.name]
        if found != tensor:
            raise BundleError(
                f"{place}: {shallow.name} takes {tensor.name} as {tensor.dtype} {list(tensor.shape)}, with unet it is "
                f"{found.dtype} {list(found.shape)}",
                hint=hint,
            )
    if not cached_tensors(unet, shallow):
        raise BundleError(f"{place}: {shallow.name} takes nothing that the unet gives", hint=hint)
    if not set(shallow.outputs) <= set(unet.outputs) or PREDICTION not in {each.name for each in shallow.outputs}:
        raise BundleError(f"{place}: {shallow.name} does not give what the unet gives", hint=hint)
    for symbol in shallow.dimensions.keys() & unet.dimensions.keys():
        if shallow.dimensions[symbol] != unet.dimensions[symbol]:
            raise BundleError(f"{place}: {shallow.name} and the unet take other ranges of {symbol}", hint=hint)
