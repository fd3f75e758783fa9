"""Deletes each barrier and narrows each mask of the real CUDA kernels, one at a time: do the tests
notice (`make simt-mutants`, of one family with ARGS="sinkhorn")? The executor does it while it
runs, by SIMT_DELETE and SIMT_NARROW, so nothing is compiled again."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = 3
# Of each family, tests that reach all of its kernels in little time.
TESTS = {
    "divergence": (
        "simt and (cross_entropy or widths and (JSD or Forward) or adaptive or uld)",
        ["tests/ops/test_parity.py", "tests/ops/test_order.py"],
    ),
    "sinkhorn": (
        "simt and (reference and (0.1 and (ragged or stopped) or implicit) or narrow or handed "
        "or pairwise and 1025 or debiased or points_are and 3 or any_length and 4097)",
        ["tests/ops/test_sinkhorn.py", "tests/ops/test_pairwise_l1.py"],
    ),
    "dual_binary": ("simt and (shape1 or shape2)", ["tests/ops/test_fdb_cuda.py"]),
    "rvq": (
        "simt and (tensor_cores or room_for or brute_force and shape1 and dtype0 or nearest_of "
        "or draws_are or codes_and_outputs or not_narrow or along_codes)",
        [
            "tests/ops/test_rvq.py",
            "tests/ops/test_rvq_search.py",
            "tests/ops/test_rvq_projected.py",
        ],
    ),
    "tree": (
        "simt and (random_trees and logits or threads or greedy or typical or status)",
        ["tests/ops/tree/test_tree_kernel.py", "tests/ops/tree/test_tree_verify.py"],
    ),
}
BARRIER = re.compile(r"__syncthreads\(\)|__syncwarp\(")
MASKED = re.compile(r"__(shfl\w*|ballot|any|all|match_any)_sync\(")


def sites():
    """(variable, "file:line", text, families) of what can be taken away."""
    for path in sorted([*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.cuh")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            families = [path.parent.name] if path.parent.name in TESTS else list(TESTS)
            if BARRIER.search(code):
                yield "SIMT_DELETE", f"{path.name}:{number}", code.strip(), families
            if MASKED.search(code):
                yield "SIMT_NARROW", f"{path.name}:{number}", code.strip(), families


def verdict(variable, site, seed, families):
    """What the first failing test said, or None."""
    environment = {**os.environ, variable: site, "SIMT_SEED": str(seed), "HF_HUB_OFFLINE": "1"}
    for family in families:
        selected, files = TESTS[family]
        command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-k", selected]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            reasons = re.findall(r"^E +(\S.*)$", result.stdout, re.MULTILINE)
            return reasons[0][:110] if reasons else f"exit code {result.returncode}"
    return None


def main():
    chosen = sys.argv[1:] or list(TESTS)
    if verdict("SIMT_NONE", "", 0, chosen) is not None:
        sys.exit("the tests fail without a mutation")
    caught = total = 0
    for variable, site, code, families in sites():
        if not set(families) <= set(chosen):  # core's are for all of them
            continue
        said = [verdict(variable, site, seed, families) for seed in range(SEEDS)]
        hits = sum(what is not None for what in said)
        total += 1
        caught += hits == SEEDS
        print(f"{site:20} {variable[5:].lower():7} caught {hits} of {SEEDS}   {code}")
        print(f"{'':20} {next((what for what in said if what), 'SURVIVED')}", flush=True)
    print(f"caught {caught} of {total}")
    sys.exit(caught != total)


if __name__ == "__main__":
    main()
