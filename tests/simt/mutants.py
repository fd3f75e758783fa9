"""Deletes each barrier and narrows each mask of the real CUDA kernels, one at a time: do the tests
notice (`make simt-mutants`)? The executor does it while it runs, by SIMT_DELETE and SIMT_NARROW, so
nothing is compiled again."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = 3
SELECTED = "simt and (cross_entropy or widths and (JSD or Forward) or adaptive or uld)"
TESTS = ["tests/ops/test_parity.py", "tests/ops/test_order.py", "-q", "-x", "-k", SELECTED]
BARRIER = re.compile(r"__syncthreads\(\)|__syncwarp\(")
MASKED = re.compile(r"__(shfl\w*|ballot|any|all|match_any)_sync\(")


def sites():
    """(variable, "file:line", text) of what can be taken away."""
    for path in sorted([*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.cuh")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if BARRIER.search(code):
                yield "SIMT_DELETE", f"{path.name}:{number}", code.strip()
            if MASKED.search(code):
                yield "SIMT_NARROW", f"{path.name}:{number}", code.strip()


def verdict(variable, site, seed):
    """What the first failing test said, or None."""
    environment = {**os.environ, variable: site, "SIMT_SEED": str(seed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    reasons = re.findall(r"^E +(\S.*)$", result.stdout, re.MULTILINE)
    return reasons[0][:110] if reasons else f"exit code {result.returncode}"


def main():
    if verdict("SIMT_NONE", "", 0) is not None:
        sys.exit("the tests fail without a mutation")
    caught = total = 0
    for variable, site, code in sites():
        said = [verdict(variable, site, seed) for seed in range(SEEDS)]
        hits = sum(what is not None for what in said)
        total += 1
        caught += hits == SEEDS
        print(f"{site:20} {variable[5:].lower():7} caught {hits} of {SEEDS}   {code}")
        print(f"{'':20} {next((what for what in said if what), 'SURVIVED')}", flush=True)
    print(f"caught {caught} of {total}")
    sys.exit(caught != total)


if __name__ == "__main__":
    main()
