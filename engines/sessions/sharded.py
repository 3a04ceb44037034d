"""A UNet whose engine is in shards: only the one that runs is in memory, and the one that runs next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sdc.engines.freed_memory import give_memory_back
from sdc.engines.session import Preparable, Run, Session
from sdc.engines.sessions.feeds import HeldFeeds, Shapes, shapes_of
from sdc.engines.specs import ComponentSpec
from sdc.engines.wiring import last_readers


class ShardedSession:
    """Engines that run one after another, each loaded when it is needed and released when it has run.

    While one runs, the next is loaded in a thread of its own, and behind the last one the first, for the next run.
    Where the sizes are those of the run before, it is made ready for them too, as far as its backend can. Tensors that
    cross are released when no later shard reads them.

    Args:
        spec: the interface of the whole network.
        shards: the engines' interfaces in the order in which they run; each takes inputs of the whole network and what
            those before it give.
        load: loads the engine of that name; called in the other thread too, never twice at a time.
        prefetch: whether the next one is loaded while one runs. Without, one is in memory at a time.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        shards: Sequence[ComponentSpec],
        load: Callable[[str], Session],
        *,
        prefetch: bool = True,
    ) -> None:
        self.spec = spec
        self._shards = tuple(shards)
        self._load = load
        self._loader = ThreadPoolExecutor(1, "sdc-shard") if prefetch else None
        self._next: tuple[int, Future[Session]] | None = None
        self._shapes: dict[int, Shapes] = {}
        self._fed: Shapes = {}
        self._last_reader = last_readers(spec, shards)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds, which are checked once; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)
        return lambda others: self._run({**held.arrays, **held.complete(others)})

    @property
    def memory_bytes(self) -> int:
        """As the shard that waits for its turn tells; between runs there is no other."""
        if self._next is None or not self._next[1].done() or self._next[1].exception() is not None:
            return 0
        return self._next[1].result().memory_bytes

    def close(self) -> None:
        """Release what is loaded; may be called twice."""
        self._drop_next()
        if self._loader is not None:
            self._loader.shutdown()
            self._loader = None

    def __enter__(self) -> ShardedSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if shapes_of(tensors) != self._fed:
            self._drop_next()  # it is ready for other sizes
            self._shapes.clear()
            self._fed = shapes_of(tensors)
        for index, shard in enumerate(self._shards):
            session = self._take(index)
            try:
                self._load_ahead((index + 1) % len(self._shards))
                feeds = {tensor.name: tensors[tensor.name] for tensor in shard.inputs}
                self._shapes[index] = shapes_of(feeds)
                tensors |= session.run(feeds)
                del feeds
            finally:
                session.close()
                del session
                give_memory_back()
            tensors = {name: array for name, array in tensors.items() if self._last_reader.get(name, -1) > index}
        return {tensor.name: tensors[tensor.name] for tensor in self.spec.outputs}

    def _take(self, index: int) -> Session:
        """The session of a shard, loaded ahead or now; what failed ahead is tried again."""
        if self._next is not None and self._next[0] == index:
            future = self._next[1]
            self._next = None
            if future.exception() is None:
                return future.result()
        self._drop_next()
        return self._open(index)

    def _load_ahead(self, index: int) -> None:
        if self._loader is not None:
            self._next = index, self._loader.submit(self._open, index)

    def _open(self, index: int) -> Session:
        session = self._load(self._shards[index].name)
        shapes = self._shapes.get(index)
        if shapes is not None and isinstance(session, Preparable):
            session.prepare(shapes)
        return session

    def _drop_next(self) -> None:
        """Release the shard that was loaded ahead; if that failed, the error is of no interest any more."""
        if self._next is not None:
            future = self._next[1]
            self._next = None
            if future.exception() is None:
                future.result().close()
