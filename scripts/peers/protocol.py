"""What a measured process speaks: a JSON object a line, asked on standard input and answered on standard output.

    python -m peers.SIDE prepare JOB      makes the files that the side needs, once
    python -m peers.SIDE serve JOB        stays up and answers

`{"do": "load"}` opens what the job names, `{"do": "run", "calls": n, "steps": m}` runs it, `{"do": "save", "path": p}`
writes the last result as `.npy`, and the end of the input ends the process. An answer with "error" is a failure. What
libraries print goes to the standard error.

It runs in every peer's environment and imports nothing but the standard library and NumPy.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
PICTURE = "picture"

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], np.ndarray]
"""One call of a network, by the input names of optimum's export, to its first output."""


@dataclass(frozen=True)
class Job:
    """What a process is for.

    Attributes:
        component: one of `COMPONENTS`, "picture", or a name that only the side knows.
        threads: that it may compute with.
        checkpoint: diffusers folder in float32.
        made: folder for what sides prepare; each has folders of its own in it.
        inputs: `.npz` file, named "component.input".
        picture: prompt, seed, guidance_scale and size_px.
        options: the side's own.
    """

    component: str
    threads: int
    checkpoint: str
    made: str
    inputs: str
    picture: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def feeds(self, component: str) -> dict[str, np.ndarray]:
        """The inputs of a component."""
        with np.load(self.inputs) as arrays:
            return {
                name.removeprefix(f"{component}."): arrays[name]
                for name in arrays.files
                if name.startswith(f"{component}.")
            }


@dataclass(frozen=True)
class Measured:
    """What calls gave.

    Attributes:
        seconds: of each call.
        result: of the last call; None where a library does not give it out.
        first_step: `time.monotonic()` when the first denoising step began and when it was done.
        extra: what else is known, as JSON.
    """

    seconds: list[float]
    result: np.ndarray | None = None
    first_step: tuple[float, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


Work = Callable[[int, int], Measured]
"""(calls, denoising steps of each where it is a picture) -> what they gave."""


def main(open_work: Callable[[Job], Work], prepare: Callable[[Job], None]) -> None:
    """The entry point of a side.

    Args:
        open_work: loads what a job names.
        prepare: makes the files that `open_work` needs, unless they are there.
    """
    end_with_parent()
    job = Job(**json.loads(sys.argv[2]))
    if sys.argv[1] == "prepare":
        prepare(job)
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(job, open_work, sys.stdin, answers)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however it does, even amid a call.

    Source: prctl(2).
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def serve(job: Job, open_work: Callable[[Job], Work], questions: TextIO, answers: TextIO) -> None:
    """Answer until the questions end."""
    state: dict[str, Any] = {}
    for line in questions:
        try:
            answer = answer_question(json.loads(line), job, open_work, state)
        except Exception as error:  # whatever a peer fails with is its row's content
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answer_question(
    question: dict[str, Any], job: Job, open_work: Callable[[Job], Work], state: dict[str, Any]
) -> dict[str, Any]:
    """One answer; what is kept between them is in `state`."""
    if question["do"] == "load":
        begin = time.perf_counter()
        state["work"] = open_work(job)
        return {"seconds": time.perf_counter() - begin}
    if question["do"] == "run":
        processor = time.process_time()
        measured: Measured = state["work"](question["calls"], question["steps"])
        state["result"] = measured.result
        return {
            "seconds": measured.seconds,
            "processor_seconds": time.process_time() - processor,
            "first_step": measured.first_step,
            "extra": measured.extra,
        }
    if question["do"] == "save":
        if state.get("result") is None:
            return {"saved": False}
        np.save(question["path"], state["result"])
        return {"saved": True}
    raise ValueError(f"expected load, run or save, found {question['do']!r}")


def repeated(run: Run, feeds: Feeds) -> Work:
    """Calls of one network with the same inputs, each timed."""

    def work(calls: int, steps: int) -> Measured:
        del steps
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            result = run(feeds)
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, result)

    return work


def made_folder(job: Job, name: str, make: Callable[[Path], None]) -> Path:
    """A folder below `made`, made at most once: it gets its name when it is complete."""
    folder = Path(job.made) / name
    if not folder.exists():
        unfinished = Path(job.made) / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder
