"""docs/adding-a-divergence.md, followed to the letter in a copy of the sources: it builds, and the
new kind passes the parity tests. The other kinds leave that table, so that the copy builds fast."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-divergence.md").read_text()
# An editable install would answer for `stillhouse` whatever the path says.
RUN = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(type(f))]; "
    "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
)


def put(path: Path, block: str, before: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, (path.name, before)
    path.write_text(text.replace(before, f"{block}\n{before}"))


def run(*command: object, **extra: object) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=900, **extra
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def follow_the_page(tree: Path) -> None:
    """Every block of the page, in order, where the page says it goes."""
    blocks = re.findall(r"^```(?:cpp|python|text)\n(.*?)^```$", PAGE, re.S | re.M)
    functions, row, kind, reference, parity = blocks
    kinds_h = tree / "csrc/divergence/kinds.h"
    table = re.search(r"#define SH_DIVERGENCE_KINDS\(X\).*?\n\n", kinds_h.read_text(), re.S)[0]
    new_table = f"#define SH_DIVERGENCE_KINDS(X) \\\n{row}\n"
    kinds_h.write_text(kinds_h.read_text().replace(table, new_table))
    put(kinds_h, functions, "// X(number, type)")
    ops = tree / "python/stillhouse/ops"
    put(ops / "kinds.py", kind, "\ndef _snake_case(")
    put(ops / "divergence_reference.py", reference, "\ndef _finite(")
    put(ops / "__init__.py", "    Triangular,", "    as_kind,\n)")
    put(tree / "tests/ops/test_parity.py", parity, "]\nPOWERS = ")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if shutil.which("g++") is None or not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree and a compiler")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "python", "tests"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    (tree / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    follow_the_page(tree)
    tools = Path(sys.executable).parent
    cmake, ninja = tools / "cmake", tools / "ninja"
    common = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    common += [f"-DPython_EXECUTABLE={sys.executable}"]
    for source, build in ((".", "build"), ("tests/simt", "simt")):
        where = ["-S", tree / source, "-B", tree / build, "-DSTILLHOUSE_CUDA=OFF"]
        run(cmake, *where, *common)
        run(cmake, "--build", tree / build)
    shutil.copy(tree / "build/_cpu.so", tree / "python/stillhouse/_cpu.so")
    return tree


def python(tree: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "python"),
        "SIMT_LIBRARY": str(tree / "simt/_simt.so"),
    }
    return run(sys.executable, "-c", RUN, *arguments, cwd=tree, env=environment)


def test_the_new_kind_passes_the_parity_tests(tree):
    printed = python(tree, "tests/ops/test_parity.py", "-q", "-k", "Triangular")
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed > 300
    assert "skipped" not in printed


def test_a_wrong_slope_is_noticed(tree):
    """The parity row is not for nothing: with another slope in the oracle it fails."""
    reference = tree / "python/stillhouse/ops/divergence_reference.py"
    right = reference.read_text()
    reference.write_text(right.replace("(lp.exp() - lq.exp()) ** 2 / (lq", "(lp - lq).exp() / (lq"))
    try:
        with pytest.raises(AssertionError, match=r"\d+ failed"):
            python(tree, "tests/ops/test_parity.py", "-q", "-k", "Triangular and wider")
    finally:
        reference.write_text(right)
