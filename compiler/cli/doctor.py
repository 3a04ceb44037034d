"""`sdc doctor`: what this machine can build and run, and why not the rest."""

from __future__ import annotations

import argparse
import json

from sdc.compiler.doctor import Diagnosis, Processor, diagnose

SUMMARY = "Show what this machine can build and run, and why not the rest."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_json(), indent=2) if args.json else "\n".join(describe(diagnosis)))
    return 0


def describe(diagnosis: Diagnosis) -> list[str]:
    """The lines for a reader."""
    versions = [f"{name} {version}" for name, version in diagnosis.versions.items() if version is not None]
    lines = [f"System     {diagnosis.system}, Python {diagnosis.python}"]
    lines += [f"Processor  {_describe_processor(diagnosis.processor)}"]
    if diagnosis.memory_bytes is not None:
        lines += [f"Memory     {diagnosis.memory_bytes / 2**30:.1f} GiB"]
    if diagnosis.cpu_arithmetic is not None:
        lines += [f"Arithmetic fp16 and int8 bundles compute in {diagnosis.cpu_arithmetic} on the target cpu"]
        lines += [f"           int8 weights for CPUs have {diagnosis.int8_weight_bits} bits"]
        kernels = "built" if diagnosis.cpu_kernels_built else "built at first use"
        kernels = kernels if diagnosis.no_cpu_kernels is None else f"none: {diagnosis.no_cpu_kernels}"
        lines += [f"Kernels    sdc's own for bf16 and int8 on the target cpu: {kernels}"]
    lines += [
        f"GPU        {gpu}, {gpu.memory_bytes / 2**30:.1f} GiB, driver for CUDA {gpu.driver_cuda}"
        for gpu in diagnosis.gpus
    ] or [f"GPU        none: {diagnosis.no_gpu}"]
    lines += [f"Versions   {', '.join(versions)}", "", f"{'Target':10} {'Build':6}{'Run':6}For"]
    reasons: dict[str, list[str]] = {}
    for target in diagnosis.targets:
        for action, reason in (("build", target.cannot_build), ("run", target.cannot_run)):
            if reason is not None:
                reasons.setdefault(f"cannot {action}: {reason}", []).append(target.name)
        build, execute = (("no" if each else "yes") for each in (target.cannot_build, target.cannot_run))
        purpose = target.devices if target.compute_capabilities else f"{target.devices}, with {target.backend}"
        lines.append(f"{target.name:10} {build:6}{execute:6}{purpose}")
    if reasons:
        lines += ["", *(f"{', '.join(names)} {reason}" for reason, names in reasons.items())]
    return lines


def _describe_processor(processor: Processor) -> str:
    text = f"{processor.name}, {processor.usable_cpus} usable CPUs"
    if processor.features is None:
        return text
    present = [name for name, there in processor.features.items() if there]
    missing = [name for name, there in processor.features.items() if not there]
    return f"{text}: {', '.join(present) or 'no vector extensions'}" + (
        f" (without {', '.join(missing)})" if missing else ""
    )
