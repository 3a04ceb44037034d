import numpy as np
import onnxruntime
import pytest

from sdc.compiler.build import build_engine
from sdc.engines.errors import BundleError, TargetError
from sdc.engines.gpu import Gpu, find_gpus
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime_cuda import why_no_cuda
from sdc.engines.targets import TARGETS

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="onnxruntime without CUDA"
)
without_gpu = pytest.mark.skipif(not isinstance(find_gpus(), str), reason="there is a GPU")


@pytest.fixture(scope="module")
def source(small_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    built = build_engine(small_unet.component, TARGETS["ort-cuda"], folder)
    assert built.files == ("ort-cuda.onnx", "ort-cuda.onnx_data")
    return EngineSource(small_unet.component.spec, "onnxruntime_cuda", (folder / built.files[0],), built.options)


@without_gpu
def test_a_machine_without_a_driver_is_refused(source):
    with pytest.raises(TargetError, match=r"cannot run .*ort-cuda\.onnx here: .*NVIDIA"):
        open_session(source)


def pretend_gpu(monkeypatch, driver_cuda="13.9"):
    gpus = (Gpu("H200", "sm90", 140 << 30, driver_cuda),)
    monkeypatch.setattr("sdc.engines.sessions.onnxruntime_cuda.find_gpus", lambda: gpus)
    why_no_cuda.cache_clear()


@without_gpu
def test_cuda_that_cannot_be_loaded_is_an_error_and_not_the_cpu(source, monkeypatch, capsys):
    """ONNX Runtime itself would run the graph on the CPU, with a warning."""
    pretend_gpu(monkeypatch)
    with pytest.raises(TargetError, match=r"cannot be used: pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        open_session(source)
    assert capsys.readouterr().out == ""


def test_an_old_driver_is_told_of(source, monkeypatch):
    pretend_gpu(monkeypatch, driver_cuda="11.8")
    with pytest.raises(TargetError, match=r"the NVIDIA driver runs CUDA 11\.8, ONNX Runtime needs \d+.*: update"):
        open_session(source)


def test_an_onnxruntime_without_cuda_is_told_so(source, monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(TargetError, match=r"was built without CUDA: install onnxruntime-gpu"):
        open_session(source)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);", TargetError),
        ("CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED", TargetError),
        ("Load model from /home/ort-cuda.onnx failed: Protobuf parsing failed.", BundleError),
    ],
)
def test_what_a_gpu_cannot_load_is_not_a_damaged_bundle(source, monkeypatch, said, error):
    """The GPU's part is played by ONNX Runtime's words: what is tested is what sdc makes of them."""

    def fail(*_, enable_fallback, **__):
        assert not enable_fallback
        raise RuntimeError(said)

    pretend_gpu(monkeypatch)
    monkeypatch.setattr("sdc.engines.sessions.onnxruntime_cuda.why_no_cuda", lambda _: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(error, match=said[:20]):
        open_session(source)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (3, 10, 14), (4, 32, 6)])
def test_equals_numpy_at_several_shapes(source, small_unet, batch, height, width):
    with open_session(source) as session:
        session.run(small_unet.feeds(seed=3))  # of another shape: the inputs' memory is made anew
        feeds = small_unet.feeds(batch=batch, height=height, width=width)
        result = session.run(feeds)["out_sample"]
    np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


@pytest.mark.gpu
def test_held_feeds_stay_on_the_gpu_and_results_survive_the_next_run(source, small_unet):
    first, second = (small_unet.feeds(seed=seed) for seed in (1, 2))
    held = {name: first[name] for name in list(first)[1:]}
    changing = next(iter(first))
    with open_session(source) as session:
        run = session.hold(held)
        results = [run({changing: feeds[changing]})["out_sample"] for feeds in (first, second)]
    for feeds, result in zip((first, second), results, strict=True):
        expected = small_unet.answer({**held, changing: feeds[changing]})
        np.testing.assert_allclose(result, expected, atol=5e-5, rtol=0)
