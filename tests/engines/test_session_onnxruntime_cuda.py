from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from sdc.compiler.build import build_engine
from sdc.engines.errors import BundleError, TargetError
from sdc.engines.gpu import Gpu, find_gpus
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.sessions.onnxruntime_binding import InputBlock
from sdc.engines.sessions.onnxruntime_cuda import CUDA_GRAPH, why_no_cuda
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
    """Runs by a graph, and between them some without it and of another shape."""
    pictures = [small_unet.feeds(seed=seed) for seed in (1, 2)]
    other = small_unet.feeds(seed=3, batch=3, height=10, width=14)
    with open_session(source) as session:
        runs = [session.hold(held_and_changing(feeds)[0]) for feeds in (*pictures, other)]
        results = []
        for _ in range(4):
            for run, feeds in zip(runs, (*pictures, other), strict=True):
                results.append((feeds, run(held_and_changing(feeds)[1])["out_sample"]))
            results.append((other, session.run(other)["out_sample"]))
    for feeds, result in results:
        np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


@pytest.fixture
def on_cpu(small_unet, tmp_path, monkeypatch):
    """The session with a CPU in the place of the GPU: all but the graph that a provider may capture.

    The engine is one for the CPU, whose operators have kernels there.
    """
    pretend_gpu(monkeypatch)
    module = "sdc.engines.sessions.onnxruntime_cuda"
    monkeypatch.setattr(f"{module}.why_no_cuda", lambda _: None)
    monkeypatch.setattr(f"{module}.PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(f"{module}.DEVICE", "cpu")
    built = build_engine(small_unet.component, TARGETS["ort-cpu"], tmp_path)
    return EngineSource(small_unet.component.spec, "onnxruntime_cuda", (tmp_path / built.files[0],), {CUDA_GRAPH: True})


def held_and_changing(feeds):
    changing = next(iter(feeds))
    return {name: feeds[name] for name in feeds if name != changing}, {changing: feeds[changing]}


def test_held_feeds_of_two_pictures_and_other_shapes_take_turns(on_cpu, small_unet):
    """Every picture holds its own; a run of another shape comes between."""
    pictures = [small_unet.feeds(seed=seed) for seed in (1, 2)]
    other = small_unet.feeds(seed=3, batch=3, height=10, width=14)
    with open_session(on_cpu) as session:
        runs = [session.hold(held_and_changing(feeds)[0]) for feeds in (*pictures, other)]
        for _ in range(3):
            for run, feeds in zip(runs, (*pictures, other), strict=True):
                results = run(held_and_changing(feeds)[1])["out_sample"]
                np.testing.assert_allclose(results, small_unet.answer(feeds), atol=5e-5, rtol=0)
            np.testing.assert_allclose(session.run(other)["out_sample"], small_unet.answer(other), atol=5e-5, rtol=0)


def test_results_survive_the_next_run(on_cpu, small_unet):
    first, second = (small_unet.feeds(seed=seed) for seed in (1, 2))
    held, changing = held_and_changing(first)
    with open_session(on_cpu) as session:
        run = session.hold(held)
        results = [run(each)["out_sample"] for each in (changing, changing, held_and_changing(second)[1], changing)]
    for result in (*results[:2], results[3]):
        np.testing.assert_allclose(result, small_unet.answer(first), atol=5e-5, rtol=0)


def test_more_shapes_than_are_kept(on_cpu, small_unet):
    shapes = [small_unet.feeds(batch=batch, height=height) for batch in (1, 2, 3) for height in (4, 6, 8, 10)]
    with open_session(on_cpu) as session:
        for feeds in (*shapes, *reversed(shapes)):
            held, changing = held_and_changing(feeds)
            result = session.hold(held)(changing)["out_sample"]
            np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


def test_a_failed_copy_of_held_feeds_is_made_again(on_cpu, small_unet, monkeypatch):
    """The memory for them holds another picture's until then."""
    first, second = (small_unet.feeds(seed=seed) for seed in (1, 2))
    with open_session(on_cpu) as session:
        runs = [session.hold(held_and_changing(feeds)[0]) for feeds in (first, second)]
        runs[0](held_and_changing(first)[1])
        with monkeypatch.context() as failing:
            failing.setattr(onnxruntime.OrtValue, "update_inplace", fail_to_copy)
            with pytest.raises(TargetError, match="CUDA failure 700"):
                runs[1](held_and_changing(second)[1])
        for index, feeds in ((1, second), (0, first)):
            result = runs[index](held_and_changing(feeds)[1])["out_sample"]
            np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


def fail_to_copy(*_):
    raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")


def test_inputs_are_fed_in_the_type_that_the_engine_takes():
    block = InputBlock(
        {"half": np.dtype(np.float16), "ids": np.dtype(np.int64)}, {"half": (2, 3), "ids": (1, 5)}, device="cpu"
    )
    graph = """
    <ir_version: 10, opset_import: ["": 23]>
    both (float16[2, 3] half, int64[1, 5] ids) => (float[2, 3] wide, int64[1, 5] same)
    {
        wide = Cast <to = 1> (half)
        same = Identity (ids)
    }
    """
    model = onnx.parser.parse_model(graph).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    block.assign({"half": np.array([[0.1, 1, 2], [3, 4, 1e-9]], np.float32), "ids": np.arange(5)[None]})
    binding = session.io_binding()
    block.bind(binding)
    for name in ("wide", "same"):
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    wide, same = binding.copy_outputs_to_cpu()
    np.testing.assert_array_equal(wide, np.array([[0.1, 1, 2], [3, 4, 0]], np.float16).astype(np.float32))
    np.testing.assert_array_equal(same, [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize("refusal", ["graph capture feature", "another reason"])
def test_an_engine_whose_graph_is_refused_runs_without(on_cpu, small_unet, monkeypatch, refusal):
    create = onnxruntime.InferenceSession

    def refuse(*arguments, providers, **options):
        if providers[0][1]["enable_cuda_graph"] == "1":
            raise RuntimeError(f"This session cannot use the {refusal} as requested by the user")
        return create(*arguments, providers=providers, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    if refusal == "another reason":
        with pytest.raises(BundleError, match="another reason"):
            open_session(on_cpu)
        return
    feeds = small_unet.feeds()
    held, changing = held_and_changing(feeds)
    with open_session(on_cpu) as session:
        run = session.hold(held)
        for _ in range(3):
            np.testing.assert_allclose(run(changing)["out_sample"], small_unet.answer(feeds), atol=5e-5, rtol=0)


def test_a_unet_is_built_for_graphs(source):
    assert source.options == {CUDA_GRAPH: True}


def gives_memory_back(options):
    try:
        return bool(options.get_run_config_entry("memory.enable_memory_arena_shrinkage"))
    except RuntimeError:  # ONNX Runtime's answer where it was not set
        return False


@pytest.fixture
def runs_without_graph(monkeypatch):
    """Of each run that captures nothing, whether ONNX Runtime is told to give its memory back."""
    seen = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def watched(session, binding, options):
        if options.get_run_config_entry("gpu_graph_id") == "-1":
            seen.append(gives_memory_back(options))
        run(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", watched)
    return seen


def test_memory_is_given_back_before_a_graph_can_be_captured_and_not_after(
    on_cpu, small_unet, runs_without_graph, monkeypatch
):
    """A graph's kernels write to memory that is free between runs. A run that fails captures nothing."""
    run = onnxruntime.InferenceSession.run_with_iobinding

    def fail(*arguments):
        run(*arguments)
        raise RuntimeError("Failed to allocate memory for requested buffer")

    large, small = small_unet.feeds(batch=4, height=32), small_unet.feeds(batch=1, height=4)
    with open_session(on_cpu) as session:
        runs = [(session.hold(held_and_changing(feeds)[0]), held_and_changing(feeds)[1]) for feeds in (large, small)]
        with monkeypatch.context() as failing:
            failing.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
            with pytest.raises(TargetError, match="if memory is short"):
                runs[0][0](runs[0][1])
        for again, changing in (*reversed(runs), *runs):
            again(changing)
    assert runs_without_graph == [True, True, False]


def test_an_engine_that_runs_seldom_always_gives_its_memory_back(on_cpu, small_unet, runs_without_graph):
    with open_session(replace(on_cpu, options={})) as session:
        for _ in range(3):
            session.run(small_unet.feeds())
    assert runs_without_graph == [True] * 3
