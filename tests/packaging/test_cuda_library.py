"""`_cuda.so` is loaded under a CUDA build of torch; a CPU build leaves it alone, in silence."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def cuda_library() -> Path:
    """The installed `_cuda.so`; skips the test when the build left it out."""
    spec = find_spec("stillhouse._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("_cuda.so is not part of this installation: no CUDA compiler when it was built")
    return Path(spec.origin).resolve()


# Prints the libraries mapped into the process after the import; warnings go to standard error.
PROGRAM = """
import pathlib, torch, warnings
warnings.simplefilter("always")
import stillhouse
mapped = {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}
print(sorted(name for name in mapped if name.endswith("_cuda.so")))
"""


def import_in_a_fresh_process() -> tuple[str, str]:
    """Standard output and error of a new interpreter that imports stillhouse."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr.strip()


def test_a_cpu_build_of_torch_leaves_it_alone_and_says_nothing():
    cuda_library()
    if torch.version.cuda:
        pytest.skip(f"this torch ({torch.__version__}) is a CUDA build")
    mapped, complaints = import_in_a_fresh_process()
    assert mapped == "[]"
    assert complaints == ""


def test_a_cuda_build_of_torch_loads_it_and_its_ops_are_registered():
    path = cuda_library()
    if not torch.version.cuda:
        pytest.skip(f"this torch ({torch.__version__}) is a CPU build")
    mapped, complaints = import_in_a_fresh_process()
    assert str(path) in mapped
    assert complaints == ""
    import stillhouse  # noqa: F401  (registers the ops asked for below)

    names = [
        name
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        if name.startswith("stillhouse::")
    ]
    assert names, "no op of stillhouse has a CUDA kernel"
