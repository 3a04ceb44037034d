import json

import pytest

from sdc.engines.errors import BundleError
from sdc.engines.manifest import LoraEntry, read_manifest, read_path


def test_reading_inverts_writing(small_bundle, tmp_path):
    manifest = read_manifest(small_bundle / "sdc.json")
    (tmp_path / "again.json").write_text(json.dumps(manifest.to_json()))
    assert read_manifest(tmp_path / "again.json") == manifest
    assert manifest.targets["cpu"].engines["unet"].options == {"inference_precision": "f32"}
    assert manifest.targets["rtx"].compute_capabilities == ("sm86", "sm89", "sm120")


def test_reads_the_optional_parts(small_bundle, edit_manifest):
    def change(value):
        value["model"]["loras"] = [{"file": "style.safetensors", "scale": 1}]
        value["pipeline"]["time_cond_proj_dim"] = 256
        value["measured_later"] = {"peak_bytes": 3}

    edit_manifest(change)
    manifest = read_manifest(small_bundle / "sdc.json")
    assert manifest.model.loras == (LoraEntry("style.safetensors", 1.0),)
    assert manifest.pipeline.time_cond_proj_dim == 256


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


def drop(*path):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


UNET = ("components", "unet")
CPU = ("targets", "cpu", "engines", "unet")


def add_shallow(manifest):
    """DeepCache's shallow UNet, which no target has an engine for."""
    unet = manifest["components"]["unet"]
    deep = ["deep.0", "float32", ["B", 7, "H", "W"]]
    shallow = {"name": "unet_shallow", "inputs": [unet["inputs"][0], deep], "outputs": [*unet["outputs"]]}
    unet["outputs"].append(deep)
    manifest["components"]["unet_shallow"] = {**shallow, "dimensions": unet["dimensions"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema", 2), "reads schema 1, found 2.*export the bundle again"),
        (put("schema", True), "reads schema 1, found True"),
        (drop("schema"), "sdc.json: the key 'schema' is missing"),
        (drop("model", "weights"), "sdc.json.model: the key 'weights' is missing"),
        (put("model", 3), "sdc.json.model: expected an object, found 3"),
        (put("model", "loras", {}), "sdc.json.model.loras: expected a list"),
        (put("precision", ""), "precision: expected a non-empty string"),
        (put("fused", 1), "fused: expected true or false, found 1"),
        (put("pipeline", "vae_reduction", 0), "vae_reduction: expected an integer of at least 1, found 0"),
        (put("pipeline", "vae_reduction", True), "vae_reduction: expected an integer"),
        (put("pipeline", "vae_scaling_factor", "0.2"), "vae_scaling_factor: expected a number"),
        (put("pipeline", "time_cond_proj_dim", 1.5), "time_cond_proj_dim: expected an integer"),
        (put("components", "net", {"name": "net"}), "expected a component named as one of text_encoder"),
        (put(*UNET, "name", "vae_decoder"), "expected a component named"),
        (put(*UNET, "inputs", 0, ["sample", "float32"]), r"inputs\[0\]: expected \[name, element type, shape\]"),
        (put(*UNET, "inputs", 0, 1, "float16"), r"inputs\[0\]\[1\]: expected one of float32, int64"),
        (put(*UNET, "inputs", 0, 2, ["B", 0]), r"inputs\[0\]\[2\]\[1\]: expected an integer of at least 1"),
        (put(*UNET, "inputs", 0, 2, ["B", 3, "H", "D"]), "the dimension 'D' of sample has no range"),
        (put(*UNET, "dimensions", "B", [1, 2, 3]), r"dimensions.B: expected \[minimum, optimum"),
        (put(*UNET, "dimensions", "B", [3, 2, 4, 1]), "dimensions.B: .*not ordered"),
        (put(*UNET, "inputs", 0, 0, "prompt.0"), "nothing provides the input 'prompt.0' of unet"),
        (
            put("components", "unet_prompt", {"name": "unet_prompt", "inputs": [], "outputs": [], "dimensions": {}}),
            "has no engine for unet_prompt, which belongs to its unet",
        ),
        (add_shallow, "has no engine for unet_shallow, which belongs to its unet"),
        (put(*CPU, "files", []), "files: expected at least one file"),
        (put(*CPU, "files", ["unet/other.xml"]), "'unet/other.xml' has no digest"),
        (put("targets", "cpu", "engines", "vae_decoder", {"files": ["sdc"], "options": {}}), "does not describe"),
        (put("targets", "cpu", "built_with", {"openvino": 1}), "built_with.openvino: expected a non-empty string"),
        (put("files", "tokenizer/vocab.json", "sha256", "0" * 63), "sha256: expected 64 hexadecimal digits"),
        (put("files", "tokenizer/vocab.json", "bytes", -1), "bytes: expected an integer of at least 0"),
        (put("files", "../outside", {"sha256": "0" * 64, "bytes": 1}), "path '../outside' leaves the bundle"),
    ],
)
def test_refuses_what_is_wrong_and_names_the_place(small_bundle, edit_manifest, change, message):
    edit_manifest(change)
    with pytest.raises(BundleError, match=message):
        read_manifest(small_bundle / "sdc.json")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a/..", "C:/x", "c:x", "a\\b", "..\\x", "", "a\0b"]
)
def test_refuses_paths_that_leave_the_bundle(path):
    with pytest.raises(BundleError, match="leaves the bundle"):
        read_path(path, "here")


@pytest.mark.parametrize("path", ["a//b", "./a", "a/", "a/./b", "."])
def test_refuses_paths_that_are_not_normal(path):
    with pytest.raises(BundleError, match="expected a normal relative path"):
        read_path(path, "here")


@pytest.mark.parametrize(
    "content", ["", "{", '{"schema": NaN}', '{"schema": 1, "schema": 1}', "[" * 100_000, b"\xff\xfe", "3"]
)
def test_refuses_what_is_no_json_object(tmp_path, content):
    path = tmp_path / "sdc.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=r"sdc\.json"):
        read_manifest(path)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(BundleError, match=r"cannot read .*sdc\.json: No such file"):
        read_manifest(tmp_path / "sdc.json")
