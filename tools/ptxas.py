"""Registers, shared memory, spills and occupancy of every CUDA kernel: `make ptxas`.

Each family's cuda.cu is compiled to machine code for each architecture. Exits with an error when a
kernel spills or a compilation says anything else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# Registers of an SM; threads that it holds at once.
REGISTERS = 65536
THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores, (?P<filled>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_one(source: Path, arch: str) -> list[dict]:
    """What ptxas says of each kernel of a file."""
    torch = Path(find_spec("torch").submodule_search_locations[0]) / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(
                "nvcc",
                "-std=c++17",
                "-O3",
                "--fmad=false",
                "-cubin",
                "-Xptxas",
                "-v",
                "--split-compile=2",
            ),
            *("-Werror", "all-warnings"),
            *("-gencode", f"arch=compute_{arch},code=sm_{arch}", "-isystem", str(torch)),
            *("-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *("-o", f"{folder}/kernels.cubin", str(source)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{source.relative_to(ROOT)} for sm_{arch}:\n{result.stderr}")
    found = [match.groupdict() for match in KERNEL.finditer(result.stderr)]
    names = subprocess.run(
        ["c++filt"], input="\n".join(k["name"] for k in found), capture_output=True, text=True
    )
    for kernel, name in zip(found, names.stdout.splitlines(), strict=True):
        kernel["name"] = short(name)
        kernel["arch"] = arch
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        kernel["shared"] = int(shared.group(1)) if shared else 0
        for key in ("registers", "spilled", "filled"):
            kernel[key] = int(kernel[key])
    return found


def short(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|stillhouse::|^void ", "", name)
    return name.split("(")[0]


def occupancy(kernel: dict) -> str:
    """Threads of an SM that the registers leave room for; they are given by eights."""
    registers = -(-kernel["registers"] // 8) * 8
    threads = min(REGISTERS // registers // 32 * 32, THREADS[kernel["arch"]])
    return f"{100 * threads // THREADS[kernel['arch']]}%"


def main() -> None:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as 90; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    sources = sorted(ROOT.glob("csrc/*/cuda.cu"))
    tasks = [(source, arch) for source in sources for arch in options.arch or ARCHITECTURES]
    spills = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for kernels in pool.map(lambda task: compile_one(*task), tasks):
            for k in sorted(kernels, key=lambda k: k["name"]):
                spills += k["spilled"] + k["filled"] > 0
                print(
                    f"sm_{k['arch']:4} {k['registers']:4d} registers {k['shared']:6d} B shared "
                    f"{k['spilled']:4d}/{k['filled']:4d} B spilled  {occupancy(k):>4} threads  "
                    f"{k['name']}",
                    flush=True,
                )
    if spills:
        sys.exit(f"{spills} kernels spill")


if __name__ == "__main__":
    main()
