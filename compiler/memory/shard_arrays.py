"""Arrays that are in memory while each shard of a UNet runs; the shards themselves are planned like other engines."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sdc.compiler.memory.engine_plan import EnginePlan, Request, component_sizes
from sdc.engines.bundle import Bundle
from sdc.engines.specs import TensorSpec
from sdc.engines.wiring import last_readers, shards_of


def arrays_beside(bundle: Bundle, engines: Mapping[str, EnginePlan], request: Request) -> dict[str, int]:
    """For each shard, in order, bytes of the arrays that `ShardedSession` and its caller have while it runs.

    They are the whole network's inputs, for all pictures; what shards before it gave and it or one behind it reads; and
    the copy of its own results. Nothing for a UNet that is whole.
    """
    specs = bundle.manifest.components
    unet, shards = specs["unet"], shards_of(specs)
    sizes = component_sizes(unet, bundle, request)
    for shard in shards:
        sizes |= engines[shard.name].sizes
    last = last_readers(unet, shards)
    given = request.groups * sum(_bytes(tensor, sizes) for tensor in unet.inputs)
    crossing: dict[str, int] = {}
    found = {}
    for index, shard in enumerate(shards):
        results = {tensor.name: _bytes(tensor, sizes) for tensor in shard.outputs}
        found[shard.name] = given + sum(crossing.values()) + sum(results.values())
        crossing = {name: count for name, count in (crossing | results).items() if last.get(name, -1) > index}
    return found


def _bytes(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    shape = (size if isinstance(size, int) else sizes[size] for size in tensor.shape)
    return math.prod(shape) * np.dtype(tensor.dtype).itemsize
