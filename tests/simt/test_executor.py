"""The executor says what is wrong with a kernel, and runs a right one: selftest.cu by cases."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILDS = {"plain": ROOT / "build/simt", "sanitized": ROOT / "build/simt-asan"}
RIGHT = [
    "reduction",
    "indices",
    "votes",
    "atomics",
    "tiles",
    "dynamic_shared",
    "async_copies",
    "barrier",
    "warp_sync",
]
REFUSED = {
    "missing_barrier": r"cell\[\d+\] before any write|race on shared array cell",
    "missing_warp_sync": r"cell\[\d+\] before any write|race on shared array cell",
    "missing_barrier_before_reuse": "race on shared array cell",
    "divergent_barrier": "divergent barrier.*has returned",
    "two_barriers": "divergent barrier",
    "early_return": "divergent barrier.*thread 63: has returned",
    "mask_leaves_itself_out": "mask leaves it out",
    "lane_does_not_come": "lanes of its mask that do not come",
    "lane_of_another_mask": "which its mask leaves out",
    "different_masks": "different masks|do not come",
    "shared_overrun": "write beyond shared array cell: index",
    "dynamic_shared_overrun": "write beyond shared array .dynamic.: index 25. of 250",
    "uninitialised_shared": r"cell\[5\] before any write",
    "too_many_threads": "a block of 1056, the limit is 1024",
    "no_block": "a launch of no thread or no block",
    "deep_block": "blockDim.z of 65",
    "wide_grid": "gridDim.y of 65536",
    "too_much_shared": "static shared memory of 56000 bytes",
    "too_much_dynamic_shared": "dynamic shared memory of 65536",
    "copy_not_waited_for": r"cell\[\d+\] before any write",
    "tile_without_a_lane": "lanes of its mask that do not come",
    "misaligned_vector": "misaligned access of 16 bytes",
}
SANITIZER = {
    "out_of_bounds": "heap-buffer-overflow",
    "use_after_free": "heap-use-after-free",
    "shift_too_far": "shift exponent .* is too large",
}


def run(build, *arguments):
    program = BUILDS[build] / "selftest"
    if not program.exists():
        pytest.skip(f"{program.relative_to(ROOT)} is not built (make test builds it)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def test_every_case_is_here():
    listed = run("plain").stdout.split()
    others = ["missing_barrier_on_global_memory", "uninitialised_output"]
    assert sorted(listed) == sorted([*RIGHT, *REFUSED, *SANITIZER, *others])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_run(case, build):
    for seed in "123":
        result = run(build, case, seed)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", REFUSED)
def test_broken_kernels_are_refused(case, build):
    for seed in "123":
        result = run(build, case, seed)
        assert result.returncode == 3
        assert re.search(REFUSED[case], result.stderr), result.stderr


@pytest.mark.parametrize("case", SANITIZER)
def test_what_the_sanitizers_find(case):
    result = run("sanitized", case)
    assert result.returncode not in (0, 3)
    assert re.search(SANITIZER[case], result.stderr), result.stderr


def test_the_order_of_threads_shows_a_missing_barrier():
    """On memory that nothing watches: the result is wrong in at least one of three orders."""
    results = {run("plain", "missing_barrier_on_global_memory", seed).returncode for seed in "123"}
    assert 1 in results


def test_fresh_outputs_are_poisoned():
    assert run("plain", "uninitialised_output").returncode == 1


def test_the_divergences_under_the_sanitizers():
    """Odd widths, slices, mixed types: the real kernels with AddressSanitizer underneath."""
    library = BUILDS["sanitized"] / "_simt.so"
    if not library.exists() or shutil.which("g++") is None:
        pytest.skip("the sanitized executor is not built (make test builds it)")
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "SIMT_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    selected = "simt and (layouts or ties or masked_teacher or mixed or guarded)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "tests/ops/test_parity.py"]
    result = subprocess.run(
        [*command, "-k", selected], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    assert re.search(r"\d\d\d passed", output), output[-500:]
