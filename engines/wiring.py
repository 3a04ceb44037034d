"""How a UNet's engines fit together, by the names of their tensors alone.

A classic UNet takes the sample, the timestep and the conditions. Where work was hoisted out of it, engines beside it
(`HOISTED`) take the timestep and conditions, and some of its inputs are their outputs. The shallow UNet of DeepCache
(`SHALLOW`) takes some of the UNet's inputs, and outputs that the UNet has beside its prediction. The shards of a UNet
(`shard_name`) take its inputs and what shards before them give; together they give its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdc.engines.errors import BundleError
from sdc.engines.specs import HOISTED, SHALLOW, ComponentSpec, TensorSpec, is_shard_name, shard_name

SAMPLE, TIMESTEP = "sample", "timestep"
PREDICTION = "out_sample"
CONDITIONS = ("encoder_hidden_states", "timestep_cond")
"""Inputs that stay the same over all steps of a run."""

_GIVEN = frozenset({SAMPLE, TIMESTEP, *CONDITIONS})
"""Inputs that a UNet is given at every step; engines beside it are given all but the sample."""

_AGAIN = "export the bundle again"


def hoisted_parts(specs: Mapping[str, ComponentSpec]) -> tuple[ComponentSpec, ...]:
    """The engines beside the UNet."""
    return tuple(specs[name] for name in HOISTED if name in specs)


def shards_of(specs: Mapping[str, ComponentSpec]) -> tuple[ComponentSpec, ...]:
    """The engines that stand in the place of the UNet's, in the order in which they run; none if it is whole."""
    count = sum(map(is_shard_name, specs))
    return tuple(specs[name] for name in map(shard_name, range(count)) if name in specs)


def last_readers(unet: ComponentSpec, shards: Sequence[ComponentSpec]) -> dict[str, int]:
    """Index of the last shard that reads a tensor, by its name; as many as there are for what the UNet gives."""
    last = {tensor.name: index for index, shard in enumerate(shards) for tensor in shard.inputs}
    return last | {tensor.name: len(shards) for tensor in unet.outputs}


def changes_with_timestep(part: ComponentSpec) -> bool:
    """Whether a hoisted engine runs for every timestep, or else once for a run."""
    return any(tensor.name == TIMESTEP for tensor in part.inputs)


def depends_on_timestep_only(part: ComponentSpec) -> bool:
    """Whether what a hoisted engine gives for a timestep is the same for all pictures."""
    return all(tensor.name == TIMESTEP for tensor in part.inputs)


def check_wiring(specs: Mapping[str, ComponentSpec], *, place: str) -> None:
    """Check that all that the UNet and the engines beside it take is provided.

    Raises:
        BundleError: an input is neither the sample, the timestep, a condition nor an output of an engine beside the
            UNet, or that output is of another type or shape; or such an engine has no UNet; or a shallow UNet does not
            fit the whole one, or shards do not make one.
    """
    parts = hoisted_parts(specs)
    if "unet" not in specs:
        lonely = [name for name in specs if name in (*HOISTED, SHALLOW) or is_shard_name(name)]
        if lonely:
            raise BundleError(f"{place}: {lonely[0]} has no unet to serve", hint=_AGAIN)
        return
    if SHALLOW in specs:
        _check_shallow(specs["unet"], specs[SHALLOW], place)
    if any(map(is_shard_name, specs)):
        _check_shards(specs["unet"], specs, place)
    provided = {tensor.name: (part.name, tensor) for part in parts for tensor in part.outputs}
    if len(provided) < sum(len(part.outputs) for part in parts):
        raise BundleError(f"{place}: two engines beside the UNet give one name", hint=_AGAIN)
    for taker in (specs["unet"], *parts):
        for tensor in taker.inputs:
            if taker.name == "unet" and tensor.name in provided:
                giver, given = provided[tensor.name]
                if (given.dtype, given.shape) != (tensor.dtype, tensor.shape):
                    raise BundleError(
                        f"{place}: unet takes {tensor.name} as {tensor.dtype} {list(tensor.shape)}, {giver} gives "
                        f"{given.dtype} {list(given.shape)}",
                        hint=_AGAIN,
                    )
            elif tensor.name not in (_GIVEN if taker.name == "unet" else _GIVEN - {SAMPLE}):
                raise BundleError(
                    f"{place}: nothing provides the input {tensor.name!r} of {taker.name}",
                    hint="export the bundle again, or use the version of sdc that wrote it",
                )


def input_shapes(unet: ComponentSpec, sample: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of all inputs of the UNet for a sample of this shape, which has all of its free dimensions."""
    shapes = {tensor.name: tensor.shape for tensor in unet.inputs}
    sizes = dict(zip(shapes[SAMPLE], sample, strict=True))
    return {
        name: tuple(sizes[size] if isinstance(size, str) else size for size in shape) for name, shape in shapes.items()
    }


def cached_tensors(unet: ComponentSpec, shallow: ComponentSpec) -> tuple[str, ...]:
    """What the shallow UNet takes of the whole one's outputs, by name."""
    given = {tensor.name for tensor in unet.outputs}
    return tuple(tensor.name for tensor in shallow.inputs if tensor.name in given)


def _check_shallow(unet: ComponentSpec, shallow: ComponentSpec, place: str) -> None:
    available = {tensor.name: ("unet", tensor) for tensor in (*unet.inputs, *unet.outputs) if tensor.name != PREDICTION}
    _check_taken(shallow, available, place)
    if not cached_tensors(unet, shallow):
        raise BundleError(f"{place}: {shallow.name} takes nothing that the unet gives", hint=_AGAIN)
    if not set(shallow.outputs) <= set(unet.outputs) or PREDICTION not in {each.name for each in shallow.outputs}:
        raise BundleError(f"{place}: {shallow.name} does not give what the unet gives", hint=_AGAIN)
    _check_ranges(unet, shallow, place)


def _check_shards(unet: ComponentSpec, specs: Mapping[str, ComponentSpec], place: str) -> None:
    count = sum(map(is_shard_name, specs))
    missing = [name for name in map(shard_name, range(max(count, 2))) if name not in specs]
    if missing:
        raise BundleError(f"{place}: the unet is in {count} shards, and {missing[0]} is missing", hint=_AGAIN)
    available = {tensor.name: ("unet", tensor) for tensor in unet.inputs}
    for part in shards_of(specs):
        _check_taken(part, available, place)
        _check_ranges(unet, part, place)
        for tensor in part.outputs:
            if tensor.name in available:
                raise BundleError(
                    f"{place}: {part.name} gives {tensor.name}, which {available[tensor.name][0]} has too", hint=_AGAIN
                )
            available[tensor.name] = (part.name, tensor)
    for tensor in unet.outputs:
        if tensor.name not in available or available[tensor.name][1] != tensor:
            raise BundleError(f"{place}: no shard gives the {tensor.name} that the unet gives", hint=_AGAIN)


def _check_taken(taker: ComponentSpec, available: Mapping[str, tuple[str, TensorSpec]], place: str) -> None:
    """Check that all that an engine takes is there, by name with where it is from, and is what it expects."""
    for tensor in taker.inputs:
        if tensor.name not in available:
            raise BundleError(f"{place}: nothing provides the input {tensor.name!r} of {taker.name}", hint=_AGAIN)
        source, found = available[tensor.name]
        if found != tensor:
            raise BundleError(
                f"{place}: {taker.name} takes {tensor.name} as {tensor.dtype} {list(tensor.shape)}, with {source} it "
                f"is {found.dtype} {list(found.shape)}",
                hint=_AGAIN,
            )


def _check_ranges(unet: ComponentSpec, other: ComponentSpec, place: str) -> None:
    for symbol in other.dimensions.keys() & unet.dimensions.keys():
        if other.dimensions[symbol] != unet.dimensions[symbol]:
            raise BundleError(f"{place}: {other.name} and the unet take other ranges of {symbol}", hint=_AGAIN)
