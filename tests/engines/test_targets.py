import re

import pytest

from sdc.engines import targets
from sdc.engines.errors import InputError
from sdc.engines.gpu import Gpu
from sdc.engines.targets import TARGETS, Target, parse_targets, runnable


def names(text):
    return [target.name for target in parse_targets(text)]


def test_parses_a_list_in_order_without_repetitions():
    assert names(" rtx, cpu,ort-cpu,RTX ") == ["rtx", "cpu", "ort-cpu"]
    assert parse_targets("cpu") == (Target("cpu", "openvino"),)
    assert parse_targets("rtx") == (Target("rtx", "tensorrt_rtx", ("sm86", "sm89", "sm120")),)
    assert parse_targets("sm75") == (Target("sm75", "tensorrt_rtx", ("sm75",)),)


def test_joins_gpus_in_one_plan_in_their_own_order():
    (target,) = parse_targets("sm120+sm86")
    assert target == Target("sm86+sm120", "tensorrt_rtx", ("sm86", "sm120"))
    assert names("sm86+sm120,sm120+sm86") == ["sm86+sm120"]


@pytest.mark.parametrize("text", ["", " , ", "gpu", "sm90", "sm86+cpu", "sm86+", "cpu+ort-cpu", "cpu;rtx"])
def test_refuses_what_does_not_exist_and_says_what_does(text):
    with pytest.raises(
        InputError, match="choose from cpu, ort-cpu, ort-cuda, rtx, sm75, sm80, sm86, sm89, sm120, sm121"
    ):
        parse_targets(text)


def test_a_gpu_that_tensorrt_for_rtx_does_not_know_is_led_to_another_target():
    with pytest.raises(InputError, match=r"unknown target 'sm90'; .*ort-cuda runs on any of NVIDIA's; choose from cpu"):
        parse_targets("sm90")


@pytest.mark.parametrize("text", ["cpu,tensorrt", "openvino-cpu"])
def test_says_what_comes_later(text):
    with pytest.raises(InputError, match="is not supported in this version"):
        parse_targets(text)


def test_the_installed_cpu_backends_are_runnable():
    assert runnable(TARGETS["cpu"]) is None
    assert runnable(TARGETS["ort-cpu"]) is None


def test_an_unknown_backend_is_not_runnable():
    assert runnable(Target("npu", "abacus")) == "this version of sdc has no backend 'abacus'"


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ("there is no NVIDIA driver on this machine", "there is no NVIDIA driver on this machine"),
        ((Gpu("RTX 4090", "sm89", 24 << 30, "13.0"),), None),
        ((Gpu("H100", "sm90", 80 << 30, "13.0"), Gpu("RTX 3060", "sm86", 12 << 30, "13.0")), None),
        (
            (Gpu("H100", "sm90", 80 << 30, "13.0"),),
            "it was built for sm86, sm89, sm120 and this machine has H100 (sm90)",
        ),
    ],
)
def test_a_plan_needs_a_gpu_that_it_was_built_for(monkeypatch, gpus, reason):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(targets, "find_gpus", lambda: gpus)
    assert runnable(TARGETS["rtx"]) == reason


def test_onnxruntime_needs_a_gpu_and_a_driver_for_its_cuda(monkeypatch):
    monkeypatch.setattr(targets, "find_gpus", lambda: "there is no NVIDIA driver on this machine")
    assert runnable(TARGETS["ort-cuda"]) == "there is no NVIDIA driver on this machine"
    monkeypatch.setattr(targets, "find_gpus", lambda: (Gpu("T4", "sm75", 16 << 30, "11.8"),))
    assert re.search(r"runs CUDA 11\.8, .*update the driver|built without CUDA", runnable(TARGETS["ort-cuda"]))
    assert TARGETS["ort-cuda"].devices == "any NVIDIA GPU"
