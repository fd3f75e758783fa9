"""The compiled libraries may need torch's stable interface, CUDA and the C/C++ runtimes only.

Any other undefined symbol ties the binary to one release of torch or to one Python.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

# Weak hooks that a linker or the C runtime's start-up code leaves in every shared library.
START_UP = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
ALLOWED = re.compile(r"(aoti_torch_|torch_|cuda[A-Z]|cu[A-Z]|__cuda)\w*")
# The C and C++ runtimes version their symbols, so a name from them carries one of these tags.
RUNTIMES = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")


def library(name: str) -> Path:
    """The installed library `stillhouse/<name>.so`; skips the test when the build left it out."""
    spec = find_spec(f"stillhouse.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"{name}.so is not part of this installation")
    return Path(spec.origin)


def undefined_symbols(path: Path) -> list[str]:
    """Names, with the version of a versioned one, that `path` expects others to define."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", "--undefined-only", str(path)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in table.splitlines()]


def foreign(symbols: list[str]) -> list[str]:
    """Those of `symbols` that come from none of the permitted libraries."""
    found = []
    for symbol in symbols:
        name, _, version = symbol.partition("@")
        runtime = version.lstrip("@").split("_")[0] in RUNTIMES
        if not (runtime or name in START_UP or ALLOWED.fullmatch(name)):
            found.append(symbol)
    return found


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_only_stable_symbols_are_needed(name):
    symbols = undefined_symbols(library(name))
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "not a torch library at all"
    assert foreign(symbols) == []


def test_instruction_sets_share_no_function():
    """Of a function that several objects define the linker keeps one copy, perhaps of AVX-512."""
    root = Path(__file__).parents[2]
    objects = sorted(root.glob("build/editable/CMakeFiles/kernels_*.dir/csrc/*/cpu.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the build folder of an editable install, and nm")
    for path in objects:
        command = ["nm", "-C", "--defined-only", str(path)]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert [line for line in table.splitlines() if line.split()[1] in "WVu"] == [], path


@pytest.mark.parametrize(("name", "needed"), [("_cpu", "libtorch_cpu"), ("_cuda", "libtorch_cuda")])
def test_the_loader_is_told_which_torch_library_is_needed(name, needed):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    command = ["readelf", "-d", str(library(name))]
    dynamic = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"[{needed}.so]" in re.findall(r"\(NEEDED\).*(\[.*\])", dynamic)
    assert not re.search(r"\[libpython", dynamic)


def test_symbols_of_torchs_unstable_interface_and_of_python_are_refused():
    unstable = "_ZNK3c1010TensorImpl5sizesEv"
    operator = "_ZN2at4_ops3add6Tensor4callERKNS_6TensorES4_RKN3c106ScalarE"
    takes_string = "_ZN3c106detail14torchCheckFailEPKcS2_jRKNSt7__cxx1112basic_stringIcEE"
    refused = [unstable, operator, takes_string, "PyObject_Call", "omp_get_num_threads"]
    permitted = [
        "aoti_torch_empty_strided",
        "torch_call_dispatcher",
        "cudaLaunchKernel",
        "memcpy@GLIBC_2.14",
        "_ZSt20__throw_length_errorPKc@GLIBCXX_3.4",
        "__cxa_begin_catch@CXXABI_1.3",
    ]
    assert foreign(refused + permitted) == refused
