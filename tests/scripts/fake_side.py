"""A side that adds, sleeps, swells or dies, as its component says; run by the tests of the worker."""

from __future__ import annotations

import os
import time

import numpy as np
from peers.protocol import Job, Measured, Work, main

kept = []


def open_work(job: Job) -> Work:
    print("a library greets on the standard output")
    if job.component == "broken":
        raise ValueError("no such network")

    def work(calls: int, steps: int) -> Measured:
        os.write(1, b"noise below Python\n")
        if job.component == "dies":
            os._exit(7)
        if job.component == "sleeps":
            time.sleep(30)
        if job.component == "swells":
            kept.append(np.ones(200 << 20, np.uint8))
            time.sleep(30)
        end = time.process_time() + 0.2
        while job.component == "burns" and time.process_time() < end:
            pass
        return Measured([float(job.threads)] * calls, np.array([steps]))

    return work


if __name__ == "__main__":
    main(open_work, lambda _: None)
