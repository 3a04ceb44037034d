import shutil
import threading

import numpy as np
import pytest

from sdc.engines import bundle as bundle_module
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import BundleError, InputError, TargetError


def flip_byte(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def with_gpu(monkeypatch):
    """This machine, if it had a GPU that runs every plan."""
    original = bundle_module.runnable
    monkeypatch.setattr(
        bundle_module, "runnable", lambda target: None if target.backend == "tensorrt_rtx" else original(target)
    )


@pytest.fixture
def without_gpu(monkeypatch):
    original = bundle_module.runnable
    monkeypatch.setattr(
        bundle_module,
        "runnable",
        lambda target: "there is no NVIDIA driver" if target.backend == "tensorrt_rtx" else original(target),
    )


@pytest.mark.parametrize("target", ["cpu", "ort-cpu"])
def test_loads_a_session_that_is_right(small_bundle, small_unet, target):
    bundle = open_bundle(small_bundle)
    feeds = small_unet.feeds()
    with bundle.load_session("unet", bundle.choose_target(target), threads=1) as session:
        np.testing.assert_allclose(session.run(feeds)["out_sample"], small_unet.answer(feeds), atol=5e-5, rtol=0)
        assert session.spec == small_unet.component.spec


def test_prefers_gpu_then_openvino_then_onnxruntime(small_bundle, with_gpu):
    assert open_bundle(small_bundle).choose_target().name == "rtx"


def test_without_a_gpu_prefers_openvino(small_bundle, without_gpu, edit_manifest):
    assert open_bundle(small_bundle).choose_target().name == "cpu"
    edit_manifest(lambda manifest: manifest["targets"].pop("cpu"))
    assert open_bundle(small_bundle).choose_target().name == "ort-cpu"
    edit_manifest(lambda manifest: manifest["targets"].pop("ort-cpu"))
    with pytest.raises(TargetError, match=r"can run no target of the bundle .*rtx: there is no NVIDIA driver"):
        open_bundle(small_bundle).choose_target()


def test_refuses_a_target_that_cannot_run_and_says_what_it_was_built_for(small_bundle, without_gpu):
    with pytest.raises(
        TargetError,
        match=r"'rtx' cannot run here: there is no NVIDIA driver; 'rtx' was built for sm86, sm89, sm120 with "
        r"tensorrt_rtx 1\.7\.1\.116; the bundle has ort-cpu, cpu, rtx",
    ):
        open_bundle(small_bundle).choose_target("rtx")


def test_refuses_a_target_that_it_does_not_have(small_bundle):
    bundle = open_bundle(small_bundle)
    with pytest.raises(TargetError, match="no engines for the target 'sm89'; it has ort-cpu, cpu, rtx"):
        bundle.choose_target("sm89")


def test_refuses_a_component_that_the_target_does_not_have(small_bundle):
    bundle = open_bundle(small_bundle)
    with pytest.raises(TargetError, match="no engine for 'vae_decoder'; it has unet"):
        bundle.load_session("vae_decoder", bundle.target("cpu"))


def test_a_target_of_a_later_version_does_no_harm(small_bundle, edit_manifest, without_gpu):
    edit_manifest(lambda manifest: manifest["targets"].update(npu=dict(manifest["targets"]["cpu"], backend="abacus")))
    bundle = open_bundle(small_bundle)
    assert bundle.choose_target().name == "cpu"
    with pytest.raises(TargetError, match="no backend 'abacus'"):
        bundle.choose_target("npu")


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin"])
def test_a_changed_byte_of_an_engine_is_found_when_it_is_loaded(small_bundle, name):
    bundle = open_bundle(small_bundle)
    bundle.load_session("unet", bundle.target("cpu")).close()
    flip_byte(small_bundle / "unet" / name, 40)
    bundle = open_bundle(small_bundle)  # sizes are right, and other engines are not read
    bundle.load_session("unet", bundle.target("ort-cpu")).close()
    with pytest.raises(BundleError, match=rf"{name} has changed since the export"):
        bundle.load_session("unet", bundle.target("cpu"))


def test_a_changed_byte_of_a_small_file_is_found_at_once(small_bundle):
    flip_byte(small_bundle / "tokenizer" / "vocab.json")
    with pytest.raises(BundleError, match=r"vocab\.json has changed since the export"):
        open_bundle(small_bundle)
    open_bundle(small_bundle, verify=False)


def test_check_digests_reads_everything(small_bundle):
    bundle = open_bundle(small_bundle)
    bundle.check_digests(remembered=False)
    flip_byte(small_bundle / "unet" / "rtx.plan")
    with pytest.raises(BundleError, match=r"rtx\.plan has changed"):
        bundle.check_digests(remembered=False)


def test_gives_checked_paths(small_bundle):
    bundle = open_bundle(small_bundle)
    assert bundle.file("tokenizer/vocab.json").read_text() == '{"a": 0}'
    with pytest.raises(BundleError, match=r"has no file 'tokenizer/merges\.txt'"):
        bundle.file("tokenizer/merges.txt")
    flip_byte(small_bundle / "tokenizer" / "vocab.json")
    with pytest.raises(BundleError, match="has changed"):
        bundle.file("tokenizer/vocab.json")


@pytest.mark.parametrize("verify", [True, False])
def test_refuses_a_truncated_and_a_missing_file(small_bundle, verify):
    path = small_bundle / "unet" / "model.onnx_data"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"model.onnx_data has {size - 1:,} bytes, the manifest says {size:,}"):
        open_bundle(small_bundle, verify=verify)
    path.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data is missing"):
        open_bundle(small_bundle, verify=verify)


def test_refuses_links_that_leave_the_bundle(small_bundle, tmp_path):
    path = small_bundle / "tokenizer" / "vocab.json"
    shutil.move(path, tmp_path / "vocab.json")
    path.symlink_to(tmp_path / "vocab.json")
    with pytest.raises(BundleError, match=r"vocab\.json is a link that leaves the bundle"):
        open_bundle(small_bundle)


def test_refuses_a_linked_folder_that_leaves_the_bundle(small_bundle, tmp_path):
    shutil.move(small_bundle / "tokenizer", tmp_path / "tokenizer")
    (small_bundle / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(BundleError, match="is a link that leaves the bundle"):
        open_bundle(small_bundle)


def test_opens_a_bundle_through_a_link(small_bundle, tmp_path):
    (tmp_path / "linked").symlink_to(small_bundle)
    assert open_bundle(tmp_path / "linked").manifest.model.name == "small"


def test_refuses_what_is_no_bundle(tmp_path):
    with pytest.raises(InputError, match=r"nothing is no bundle: no such folder; `sdc export` makes one"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"there is no sdc\.json in it"):
        open_bundle(tmp_path)


def test_writes_nothing_into_the_bundle(small_bundle, small_unet):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in small_bundle.rglob("*")}

    before = state()
    for path in (*small_bundle.rglob("*"), small_bundle):
        path.chmod(0o555 if path.is_dir() else 0o444)
    bundle = open_bundle(small_bundle)
    for target in ("cpu", "ort-cpu"):
        with bundle.load_session("unet", bundle.target(target)) as session:
            session.run(small_unet.feeds())
    assert state() == before
    for path in (small_bundle, *small_bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_sessions_load_in_several_threads_at_once(small_bundle, small_unet):
    bundle, feeds, results = open_bundle(small_bundle), small_unet.feeds(), []

    def work(target):
        with bundle.load_session("unet", bundle.target(target), threads=1) as session:
            results.append(session.run(feeds)["out_sample"])

    threads = [threading.Thread(target=work, args=(target,)) for target in ("cpu", "ort-cpu") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_allclose(result, small_unet.answer(feeds), atol=5e-5, rtol=0)


def test_a_file_that_cannot_be_read_is_named(small_bundle):
    bundle = open_bundle(small_bundle)
    (small_bundle / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"cannot read .*model\.onnx: No such file"):
        bundle.load_session("unet", bundle.target("ort-cpu"))
