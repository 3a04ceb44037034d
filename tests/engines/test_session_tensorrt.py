import sys

import numpy as np
import pytest

from sdc.compiler.build import build_engine
from sdc.engines.errors import BundleError, TargetError
from sdc.engines.gpu import Gpu, find_gpus
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import COMPUTE_CAPABILITIES, TARGETS, Target

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("cuda.bindings")

without_gpu = pytest.mark.skipif(not isinstance(find_gpus(), str), reason="there is a GPU")


@pytest.fixture(scope="module")
def plan(small_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return folder / build_engine(small_unet.component, TARGETS["rtx"], folder).files[0]


def make_source(small_unet, path, compute_capabilities=("sm86", "sm89", "sm120")):
    return EngineSource(
        spec=small_unet.component.spec,
        backend="tensorrt_rtx",
        files=(path,),
        compute_capabilities=compute_capabilities,
        origin="'rtx' was built for sm86, sm89, sm120 with tensorrt_rtx 1.7.1.116",
    )


@without_gpu
def test_a_good_plan_without_a_gpu_is_refused_with_its_origin(small_unet, plan):
    with pytest.raises(
        TargetError, match=r"cannot run .*rtx\.plan here: .*NVIDIA.*; 'rtx' was built for sm86.*tensorrt_rtx 1\.7"
    ):
        open_session(make_source(small_unet, plan))


@pytest.mark.parametrize("content", [b"", b"vtrt", b"\1" * 5000, b"\0" * 64])
def test_damaged_headers_are_found_without_a_gpu(small_unet, tmp_path, content):
    path = tmp_path / "rtx.plan"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"rtx\.plan is not an engine that tensorrt_rtx can read"):
        open_session(make_source(small_unet, path))


def test_another_gpu_is_refused(small_unet, plan, monkeypatch):
    hopper = (Gpu("H100", "sm90", 80 << 30, "13.0"),)
    monkeypatch.setattr("sdc.engines.sessions.tensorrt.find_gpus", lambda: hopper)
    with pytest.raises(TargetError, match=r"here: this machine has H100 \(sm90\); 'rtx' was built for"):
        open_session(make_source(small_unet, plan))


def test_a_machine_without_tensorrt_is_told_what_to_install(small_unet, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.delitem(sys.modules, "sdc.engines.sessions.tensorrt", raising=False)
    with pytest.raises(TargetError, match=r"needs the package tensorrt_rtx.*pip install 'sdc\[tensorrt\]'"):
        open_session(make_source(small_unet, plan))


@pytest.fixture(scope="module")
def own_plan(small_unet, tmp_path_factory):
    """A plan for the GPU in this machine."""
    gpus = find_gpus()
    if isinstance(gpus, str) or gpus[0].compute_capability not in COMPUTE_CAPABILITIES:
        pytest.skip(f"TensorRT for RTX runs on none of {gpus}")
    capability = gpus[0].compute_capability
    folder = tmp_path_factory.mktemp("own")
    built = build_engine(small_unet.component, Target(capability, "tensorrt_rtx", (capability,)), folder)
    return make_source(small_unet, folder / built.files[0], (capability,))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (4, 32, 6), (3, 10, 14)])
def test_equals_numpy_at_several_shapes(own_plan, small_unet, batch, height, width):
    feeds = small_unet.feeds(batch=batch, height=height, width=width)
    with open_session(own_plan) as session:
        result = session.run(feeds)["out_sample"]
    np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


@pytest.mark.gpu
def test_shapes_may_change_between_runs_and_two_sessions_share_scratch_memory(own_plan, small_unet):
    shapes = [(1, 4, 4), (4, 32, 32), (2, 8, 12)]
    with open_session(own_plan) as first, open_session(own_plan) as second:
        assert first._scratch is second._scratch
        for batch, height, width in shapes:
            feeds = small_unet.feeds(batch=batch, height=height, width=width)
            for session in (first, second):
                result = session.run(feeds)["out_sample"]
                np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)
        assert first.memory_bytes > 0
    assert first.memory_bytes == 0
