import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdc.compiler import doctor
from sdc.compiler.cli.doctor import describe
from sdc.compiler.doctor import diagnose, parse_cpuinfo
from sdc.engines import targets
from sdc.engines.gpu import Gpu
from sdc.engines.kernels.build import build_kernels
from sdc.engines.kernels.library import missing_for_kernels
from sdc.engines.targets import TARGETS

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3:1 GHz
flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_vnni
processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_reads_features_from_cpuinfo():
    processor = parse_cpuinfo(CPUINFO, usable_cpus=3)
    assert (processor.name, processor.usable_cpus) == ("Some CPU @ 3:1 GHz", 3)
    assert [name for name, there in processor.features.items() if there] == ["AVX2", "AVX-512", "VNNI"]


def test_other_architectures_have_no_features():
    assert parse_cpuinfo("processor : 0\nFeatures : fp asimd\n", usable_cpus=1).features is None


def test_finds_every_target_and_says_why_not():
    diagnosis = diagnose()
    found = {target.name: target for target in diagnosis.targets}
    assert list(found) == list(TARGETS)
    for name in ("cpu", "ort-cpu"):
        assert found[name].cannot_build is None
        assert found[name].cannot_run is None
    assert diagnosis.versions["openvino"] is not None
    assert diagnosis.memory_bytes > 2**28
    assert (diagnosis.no_gpu is None) == bool(diagnosis.gpus)
    json.dumps(diagnosis.to_json())


@pytest.mark.parametrize("module", ["openvino", "tensorrt_rtx"])
def test_a_missing_backend_is_named_with_what_to_install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for target in diagnose().targets:
        if doctor.BACKEND_MODULES[target.backend] == module:
            assert f"{module} is not installed: pip install 'sdc[" in target.cannot_build
            assert f"{module} is not installed: pip install 'sdc[" in target.cannot_run


def test_the_text_joins_targets_with_the_same_reason(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings")
    ada = (Gpu("RTX 4090", "sm89", 24 << 30, "13.0"),)
    monkeypatch.setattr(doctor, "find_gpus", lambda: ada)
    monkeypatch.setattr(targets, "find_gpus", lambda: ada)
    text = "\n".join(describe(diagnose()))
    assert "GPU        RTX 4090 (sm89), 24.0 GiB, driver for CUDA 13.0" in text
    assert "sm89       yes   yes   sm89" in text
    assert "sm75       yes   no    sm75" in text
    assert "sm75 cannot run: it was built for sm75 and this machine has RTX 4090 (sm89)" in text
    assert "rtx cannot" not in text


def test_says_whether_there_are_cpu_kernels(monkeypatch, tmp_path):
    monkeypatch.delenv("SDC_KERNELS", raising=False)
    missing = missing_for_kernels()
    what = "Kernels    sdc's own for bf16 and int8 on the target cpu"
    found = "built" if isinstance(build_kernels(), Path) else f"none: {missing}"
    assert f"{what}: {found}" in describe(diagnose())
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "empty"))
    found = "built at first use" if missing is None else f"none: {missing}"
    assert f"{what}: {found}" in describe(diagnose())
    monkeypatch.setenv("SDC_KERNELS", "0")
    text = "\n".join(describe(diagnose()))
    assert (
        "Kernels    sdc's own for bf16 and int8 on the target cpu: none: they are switched off by SDC_KERNELS=0" in text
    )


def test_needs_none_of_the_compilers_dependencies():
    blocked = ("torch", "diffusers", "onnx", "onnx_ir", "psutil", "rich", "tensorrt_rtx", "cuda")
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "from sdc.compiler.cli.doctor import describe, diagnose\n"
        "print('\\n'.join(describe(diagnose())))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cpu        no    yes   the CPU, with openvino" in result.stdout


def test_a_cache_that_cannot_be_read_is_no_defect(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "cache"))
    assert not diagnose().cpu_kernels_built
