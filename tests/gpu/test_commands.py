"""make test-gpu, make bench-gpu and their page: on a machine without a GPU, and on the pretended one."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import ALL, PAGE, PARTS, page
from benchmarks.profile_step import kind_of
from tests.gpu.test_pretended import WHOLE
from tests.helpers.paths import REPO


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)


@pytest.mark.parametrize("what", PARTS)
def test_without_a_gpu_one_line_says_what_would_be_done(what):
    done = run(what)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert all(name in done.stdout for name in PARTS[what])


def test_a_part_that_does_not_exist_is_refused():
    done = run("bench", "golden")
    assert done.returncode == 2 and "python -m benchmarks.gpu bench" in done.stderr


# The quickstart pretrains its tower, for minutes where every operation is looked at; `programs.py` has what it runs.
@pytest.mark.parametrize("name", [name for name in ALL if WHOLE and name != "quickstart"] or ["environment"])
def test_a_part_runs_on_the_pretended_gpu(name, tmp_path):
    """At a tiny size: the programs, options and devices of the first run on a real GPU, without its kernels."""
    done = run("pretend", str(tmp_path), name)
    entry = json.loads((tmp_path / f"{name}.json").read_text())
    assert "error" not in entry, entry["error"]
    assert '"failed"' not in json.dumps(entry)
    assert done.returncode == 0 and entry["result"]


def test_the_page_says_what_has_not_been_measured():
    text = page(
        {"golden": {"result": {"tables": ["311 quantities compared, 0 failed"]}}, "moe_layer": {"error": "no memory"}}
    )
    assert text.count("not measured yet") == len(ALL) - 2
    assert "311 quantities" in text and "no memory" in text


def test_the_page_without_results_is_the_committed_one():
    if "not measured yet" in PAGE.read_text() and "```json" not in PAGE.read_text():
        assert PAGE.read_text() == page({}), "python -m benchmarks.gpu page"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...GemmUniversal...>>", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31", "attention"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norms"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>", "routing"),
    ],
)
def test_kernels_of_a_gpu_are_told_apart(kernel, kind):
    assert kind_of(kernel) == kind
