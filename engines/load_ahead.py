"""Engines that are loaded in a thread of their own, before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sdc.engines.session import Preparable, Session
from sdc.engines.sessions.feeds import Shapes
from sdc.engines.targets import OPENVINO


def loads_unet_ahead(backend: str, *, prefetch: bool) -> bool:
    """Whether a pipeline loads the UNet while the text encoder runs: only OpenVINO takes long to compile it."""
    return prefetch and backend == OPENVINO


class _GivenUpError(Exception):
    """Nobody waits for an engine any more."""


class _Gate:
    """What an engine waits at before it takes the memory of its weights."""

    def __init__(self, *, is_open: bool) -> None:
        self._is_settled = threading.Event()
        self._is_given_up = False
        if is_open:
            self.open()

    @property
    def waits(self) -> bool:
        """Whether nobody has said yet what comes of it."""
        return not self._is_settled.is_set()

    def open(self) -> None:
        """There is memory now."""
        self._is_settled.set()

    def give_up(self) -> None:
        """Nobody needs the engine; one that is past the gate goes on all the same."""
        self._is_given_up |= self.waits
        self._is_settled.set()

    def wait(self) -> None:
        """Until it is open.

        Raises:
            _GivenUpError: it will not be.
        """
        self._is_settled.wait()
        if self._is_given_up:
            raise _GivenUpError


@dataclass(frozen=True)
class _Loading:
    """An engine on its way.

    Attributes:
        shapes: that it is made ready for.
        gate: that it waits at.
        session: it, in the end.
    """

    shapes: tuple[Shapes, ...]
    gate: _Gate
    session: Future[Session]


class LoadAhead:
    """Begins to load engines, and hands them over. All but the loading itself is for one thread.

    Args:
        load_session: loads the engine of a component; called in threads, beside other calls of it.
    """

    def __init__(self, load_session: Callable[[str], Session]) -> None:
        self._load_session = load_session
        self._loading: dict[str, _Loading] = {}

    def begin(self, component: str, shapes: Sequence[Shapes], *, waits: bool = False) -> None:
        """Load an engine and make it ready for inputs of these shapes; what is loaded for others is released first.

        If it `waits`, it does not take the memory of its weights until `go_on` is called or it is taken; one of these,
        `give_up` or `release` has to come, as the interpreter waits for all threads at its end.
        """
        wanted = tuple(shapes)
        loading = self._loading.get(component)
        if loading is not None and loading.shapes == wanted:
            return
        self.release(but=self._loading.keys() - {component})
        gate = _Gate(is_open=not waits)
        executor = ThreadPoolExecutor(1, f"sdc-load-{component}")
        try:
            session = executor.submit(self._load, component, wanted, gate)
            self._loading[component] = _Loading(wanted, gate, session)
        except BaseException:  # an interrupt between the two
            gate.give_up()
            raise
        executor.shutdown(wait=False)  # the thread ends with its work

    def go_on(self) -> None:
        """There is memory now for what waits for it."""
        for loading in self._loading.values():
            loading.gate.open()

    def give_up(self) -> None:
        """Release what waits for memory, or would."""
        self.release(but=[component for component, loading in self._loading.items() if not loading.gate.waits])

    def is_loading(self, component: str) -> bool:
        """Whether an engine was begun and not taken yet."""
        return component in self._loading

    def take(self, component: str) -> Session | None:
        """The engine, once it is ready; None if it was not begun.

        Raises:
            Exception: what loading it raised. It is forgotten, so that it can be tried again.
        """
        loading = self._loading.get(component)
        if loading is None:
            return None
        loading.gate.open()
        loading.session.exception()  # if this wait is interrupted, `release` still knows the engine
        del self._loading[component]
        return loading.session.result()

    def release(self, *, but: Container[str] = ()) -> None:
        """Wait for all engines, or all but some, and release them; if one failed, nobody needs it any more."""
        for component in [name for name in self._loading if name not in but]:
            loading = self._loading[component]
            loading.gate.give_up()
            if loading.session.exception() is None:
                loading.session.result().close()
            del self._loading[component]

    def _load(self, component: str, shapes: tuple[Shapes, ...], gate: _Gate) -> Session:
        session = self._load_session(component)
        if isinstance(session, Preparable):
            try:
                session.prepare(*shapes, before_weights=gate.wait)
            except BaseException:
                session.close()
                raise
        return session
