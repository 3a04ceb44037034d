"""A UNet in shards: the graphs that `shard` gives, with their interfaces."""

from __future__ import annotations

from sdc.compiler.component import Component
from sdc.compiler.hoisting import interface_of
from sdc.compiler.inner_sizes import InnerSizes
from sdc.engines.specs import shard_name
from sdc.passes.base import PassReport
from sdc.passes.sharding.shard import shard


def shard_component(unet: Component, count: int) -> tuple[tuple[Component, ...], PassReport]:
    """Cut a UNet into shards; its graph is left as it is.

    Cuts are where every tensor that crosses has sizes that an interface can have: whole fractions of the UNet's own.

    Returns:
        The shards in the order in which they run. And the report, with the weights of each.

    Raises:
        InputError: the UNet cannot be cut into so many.
        PassError: it cannot be cut at all.
    """
    inner = InnerSizes(unet.spec)
    sizes = {symbol: size.optimum for symbol, size in unet.spec.dimensions.items()}
    sharded = shard(unet.model, count, sizes=sizes, may_cross=lambda shape: inner.name_shape(shape) is not None)
    own = {tensor.name for tensor in (*unet.spec.inputs, *unet.spec.outputs)}
    for model in sharded.models:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name not in own and value.shape is not None:
                value.shape = inner.name_shape(value.shape)
    known = inner.known()
    shards = tuple(
        Component(interface_of(shard_name(index), model.graph, known), model)
        for index, model in enumerate(sharded.models)
    )
    return shards, sharded.report
