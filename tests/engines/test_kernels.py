"""The CPU kernels: attention against float64, and what happens where they cannot be built."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from attention_reference import (
    SHAPES,
    attend,
    attention,
    bits_from_floats,
    draw,
    floats_from_bits,
    relative_error,
    rows,
)

from sdc.engines.errors import InputError
from sdc.engines.kernels import build
from sdc.engines.kernels.build import Toolchain, build_kernels, find_toolchain, missing_to_build
from sdc.engines.kernels.library import Kernels, find_kernels

TESTS = Path(__file__).parent


@pytest.fixture
def toolchain() -> Toolchain:
    found = find_toolchain()
    if isinstance(found, str):
        pytest.skip(f"no CPU kernels: {found}")
    return found


# Probabilities and the result are rounded to bf16, each with an error of up to 2^-9, 1.1e-3 on average. With AMX the
# logarithms of probabilities are rounded too, to 1/128: an error of up to 2^-8 · ln(2) more.
TOLERANCES = {"AVX512_BF16": 2.6e-3, "AMX_BF16": 3.1e-3}


@pytest.fixture(scope="module", params=TOLERANCES)
def in_bf16(kernels, request) -> tuple[Kernels, float]:
    """Kernels that compute with one instruction set, and what their error stays below."""
    found = Kernels(kernels.path, amx=request.param == "AMX_BF16")
    if found.instructions() != request.param:
        pytest.skip(f"the processor has no {request.param}")
    return found, TOLERANCES[request.param]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(in_bf16, shape, causal):
    kernels, tolerance = in_bf16
    operands = draw(shape)
    heads = shape[1]
    expected = attention(*operands, heads=heads, scale=shape[4] ** -0.5, causal=causal)
    assert relative_error(attend(kernels, operands, heads=heads, causal=causal), expected) < tolerance


@pytest.mark.parametrize("spread", [0.01, 3.0, 20.0, 60.0, 1000.0])
def test_logits_of_any_size(in_bf16, spread):
    kernels, tolerance = in_bf16
    shape = (1, 2, 70, 1000, 40)
    operands = draw(shape, spread=spread)
    # The largest logits last: the reference has to be raised in nearly every block, by far more than its headroom.
    operands[1] = bits_from_floats(floats_from_bits(operands[1]) * np.linspace(0.01, 1, 1000)[:, None])
    expected = attention(*operands, heads=2, scale=40**-0.5)
    found = attend(kernels, operands, heads=2)
    assert np.isfinite(found).all()
    # A logit of size x has the error x * 2^-24 * sqrt(20) from its sum in float32, small beside that of bf16 up to 60.
    assert relative_error(found, expected) < (tolerance if spread <= 60 else 5e-3)


def test_logits_beyond_any_use_give_a_mean_of_values(in_bf16):
    """Float32 does not tell all such logits apart; integers of 32 bits do not hold 128 times their differences."""
    kernels, _ = in_bf16
    operands = draw((1, 2, 70, 300, 40))
    operands[0] = bits_from_floats((1e6 * floats_from_bits(operands[0])).astype(np.float32))
    values = floats_from_bits(operands[2])
    found = attend(kernels, operands, heads=2)
    assert (found <= values.max(axis=1, keepdims=True) + 0.02).all()
    assert (found >= values.min(axis=1, keepdims=True) - 0.02).all()


@pytest.mark.parametrize("key", [3, 40, 299])
def test_one_key_may_take_all(in_bf16, key):
    """By a factor that no float holds, wherever it is: among the first keys, or behind all that references know."""
    kernels, _ = in_bf16
    operands = draw((1, 1, 20, 300, 40))
    operands[1][0, key] = bits_from_floats(1000 * floats_from_bits(operands[0][0, 3]))
    found = attend(kernels, operands, heads=1)
    np.testing.assert_array_equal(found[0, 3], floats_from_bits(operands[2][0, key]))


def test_padding_does_not_count_where_all_logits_are_very_low(in_bf16):
    """A padded key has the logit 0 unless it is hidden, 2^1000 times as much as these."""
    kernels, tolerance = in_bf16
    operands = draw((1, 1, 5, 77, 8))
    operands[0][:] = bits_from_floats(np.full(1, 50.0, np.float32))
    operands[1][:] = bits_from_floats(np.full(1, -50.0, np.float32))
    expected = attention(*operands, heads=1, scale=8**-0.5)
    assert relative_error(attend(kernels, operands, heads=1), expected) < tolerance


def test_a_nan_stays_in_its_row(path):
    kernels, eight_bits = path
    operands = draw((2, 2, 90, 200, 40))
    clean = attend(kernels, operands, heads=2, eight_bits=eight_bits)
    operands[0][1, 67, 41] = 0x7FC0  # batch 1, query 67, head 1
    found = attend(kernels, operands, heads=2, eight_bits=eight_bits)
    assert np.isnan(found[1, 67, 40:]).all()
    found[1, 67, 40:] = clean[1, 67, 40:]
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("operand", [1, 2])
def test_a_nan_among_keys_or_values_is_not_lost(path, operand):
    kernels, eight_bits = path
    operands = draw((1, 2, 20, 200, 40))
    clean = attend(kernels, operands, heads=2, eight_bits=eight_bits)
    operands[operand][0, 151, 3] = 0x7FC0  # head 0; not among the keys that a mean is made of
    found = attend(kernels, operands, heads=2, eight_bits=eight_bits)
    features = slice(0, 40) if operand == 1 else slice(3, 4)
    assert np.isnan(found[:, :, features]).all()
    found[:, :, features] = clean[:, :, features]
    np.testing.assert_array_equal(found, clean)


def test_reads_and_writes_with_strides(path):
    """Query, key and value are slices of one projection; the output is a slice too, and what lies around it stays."""
    kernels, eight_bits = path
    merged = np.concatenate(draw((2, 3, 50, 50, 24)), axis=2)
    operands = [merged[:, :, 72 * i : 72 * (i + 1)] for i in range(3)]
    output = np.full((2, 50, 100), 0xABCD, np.uint16)
    kernels.attend(*map(rows, (*operands, output[:, :, 20:92])), heads=3, scale=24**-0.5, eight_bits=eight_bits)
    expected = attend(kernels, [np.ascontiguousarray(operand) for operand in operands], heads=3, eight_bits=eight_bits)
    np.testing.assert_array_equal(floats_from_bits(output[:, :, 20:92]), expected)
    assert (output[:, :, :20] == 0xABCD).all()
    assert (output[:, :, 92:] == 0xABCD).all()


def test_calls_are_equal_whatever_ran_before_and_beside_them(path):
    """The workspaces of threads are used again: with other sizes before, and by several callers at once."""
    kernels, eight_bits = path
    shapes = [(2, 2, 300, 300, 40), (1, 4, 70, 77, 160), (1, 1, 5, 3, 8)]
    drawn = [draw(shape, seed=seed) for seed, shape in enumerate(shapes)]
    first = [
        attend(kernels, operands, heads=shape[1], eight_bits=eight_bits)
        for operands, shape in zip(drawn, shapes, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [
            (i % 3, pool.submit(attend, kernels, drawn[i % 3], heads=shapes[i % 3][1], eight_bits=eight_bits))
            for i in range(24)
        ]
        for index, job in jobs:
            np.testing.assert_array_equal(job.result(), first[index])


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [((1, 2, 4, 4, 9), 2, "the head size must be even"), ((1, 2, 4, 4, 8), 3, "with 3 heads do not fit")],
)
def test_refuses_what_it_cannot_compute(kernels, shape, heads, message):
    with pytest.raises(InputError, match=message):
        attend(kernels, draw(shape), heads=heads)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_refuses_a_scale_that_is_not_positive(kernels, scale):
    operands = draw((1, 1, 4, 4, 8))
    with pytest.raises(InputError, match="the scale must be positive and finite"):
        kernels.attend(*map(rows, (*operands, operands[0].copy())), heads=1, scale=scale)


@dataclass(frozen=True)
class QuickCompiler:
    """The compiler on the PATH: a script that fails while there is a file `broken`, and else runs the real one."""

    path: Path
    broken: Path


@pytest.fixture
def quick_compiler(toolchain, monkeypatch, tmp_path) -> QuickCompiler:
    """One that does not optimise, and a cache of its own."""
    found = QuickCompiler(tmp_path / "bin" / "c++", tmp_path / "broken")
    found.path.parent.mkdir()
    found.path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" != --version ] && [ -f {found.broken} ] && {{ echo "x.cpp:1: error: no space" >&2; exit 1; }}\n'
        f'exec {toolchain.compiler} "$@" -O1\n',
        encoding="utf-8",
    )
    found.path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{found.path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "cache"))
    return found


def test_is_built_once_and_anew_when_a_source_changes(toolchain, quick_compiler, monkeypatch):
    first = build_kernels()
    assert isinstance(first, Path), first
    written = first.stat().st_mtime_ns
    assert build_kernels() == first
    assert first.stat().st_mtime_ns == written
    assert sorted(file.name for file in first.parent.iterdir()) == [
        "libsdc_kernels.sha256",
        "libsdc_kernels.so",
        "lock",
    ]
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DSDC_CHANGED"))
    assert toolchain.digest() != first.parent.name


def cpuinfo_with(flags: set[str], folder: Path) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {' '.join(sorted(flags))}\n", encoding="utf-8")
    return path


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    """The machine is made to look as one that runs the kernels, wherever the test runs; the search is the real one."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    cpuinfo = cpuinfo_with(build._NEEDED, tmp_path)
    assert build_kernels(cpuinfo) == "there is no C++ compiler (c++, g++, clang++) on the PATH"
    assert missing_to_build(cpuinfo) == build_kernels(cpuinfo)


def test_other_machines_are_named(monkeypatch, tmp_path):
    """This machine is one of them at most, so the others are played."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "this is Linux on aarch64" in str(find_toolchain())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    without = cpuinfo_with(build._NEEDED - {"avx512_bf16"}, tmp_path)
    assert find_toolchain(without) == "the processor has no avx512_bf16"


def test_a_compiler_that_fails_is_quoted_until_it_does_not(quick_compiler):
    quick_compiler.broken.touch()
    assert missing_to_build() is None
    reason = build_kernels()
    assert reason == f"{quick_compiler.path} failed: x.cpp:1: error: no space"
    assert missing_to_build() == reason
    quick_compiler.broken.unlink()
    assert isinstance(build_kernels(), Path)
    assert missing_to_build() is None


def test_a_damaged_library_is_built_anew(quick_compiler):
    """Loading one that is cut off would end the process with a bus error."""
    library = build_kernels()
    assert isinstance(library, Path)
    whole = library.read_bytes()
    for damaged in (whole[:20_000], whole[:20_000] + bytes(1000) + whole[21_000:]):
        library.write_bytes(damaged)
        assert build_kernels() == library
        assert library.stat().st_size == len(whole)
    assert Kernels(library).instructions() is not None


def test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SDC_KERNELS", "0")
    assert find_kernels() == "they are switched off by SDC_KERNELS=0"


@pytest.mark.slow
def test_touches_no_memory_that_is_not_its_own(toolchain, tmp_path):
    """A build with the sanitizers of addresses and undefined behaviour runs all shapes of this file."""
    sanitised = tmp_path / "libsanitised.so"
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    subprocess.run(toolchain.command(sanitised, flags=flags), check=True)
    asan = subprocess.run(
        [toolchain.compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from attention_reference import SHAPES, attend, attention, draw, relative_error
        import convolution_reference as convolutions
        import group_norm_reference as group_norms
        from sdc.engines.kernels.library import Kernels
        sides = ((True, False, False), (False, False, False), (False, True, False), (False, False, True))
        for amx, causal, eight_bits in sides:
            kernels = Kernels(Path(sys.argv[1]), amx=amx)
            tolerance = 0.017 if eight_bits else 3.1e-3
            for shape in SHAPES:
                operands = draw(shape)
                expected = attention(*operands, heads=shape[1], scale=shape[4] ** -0.5, causal=causal)
                found = attend(kernels, operands, heads=shape[1], causal=causal, eight_bits=eight_bits)
                assert relative_error(found, expected) < tolerance, (shape, amx, causal, eight_bits)
        for shape in group_norms.SHAPES:
            for silu in (False, True):
                images, affine = group_norms.draw(shape)
                options = {"groups": shape[3], "epsilon": 1e-5, "silu": silu, "addend": images[:, :1]}
                expected = group_norms.group_norm(images, affine, **options)
                zeros = images * 0
                found = group_norms.normalise(kernels, images, affine, **options, summand=(zeros, zeros))
                assert relative_error(found, expected) < group_norms.TOLERANCE, (shape, silu)
        convolver = Kernels(Path(sys.argv[1])).convolver
        for shape in convolutions.SHAPES if convolver else ():
            for bytes, gated in ((False, False), (True, False), (False, True), (True, True)):
                case = convolutions.draw(shape, bytes=bytes, gated=gated)
                found = convolutions.convolve(convolver, case)
                assert relative_error(found, convolutions.convolution(case)) < 2**-8, (shape, bytes, gated)
        """
    )
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(sanitised), str(TESTS)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
