"""What a run leaves on the disk, and in which order: a checkpoint never counts on losses that are not there yet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdc.compiler.distill.progress_files import LossLog
from sdc.compiler.distill.training_loop import Reporting, Training, run_steps


def test_losses_are_on_the_disk_before_a_checkpoint_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    really = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"{path.name}, {len(path.read_text().splitlines())} lines")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    training = Training(
        optimize=lambda step: {"loss": 1 / step, "learning_rate": 0.1, "gradient_norm": 1.0},
        save=lambda step, _: events.append(f"checkpoint of step {step}"),
        draw=lambda _: None,
    )
    path, reporting = tmp_path / "losses.jsonl", Reporting(tmp_path, [], checkpoint_every=2)
    for begin, end in ((0, 3), (2, 4)):  # the second one goes on from a checkpoint and does a step again
        losses = LossLog(path, step=begin)
        run_steps(training, range(begin + 1, end + 1), seconds=0.0, losses=losses, reporting=reporting)
        losses.close()
    first = ["losses.unfinished, 0 lines", "losses.jsonl, 2 lines", "checkpoint of step 2"]
    again = ["losses.unfinished, 2 lines", "losses.jsonl, 4 lines", "checkpoint of step 4"]
    assert events == [*first, "losses.jsonl, 3 lines", "checkpoint of step 3", *again]
    assert len(path.read_text().splitlines()) == 4
