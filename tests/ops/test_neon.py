"""The kernels as AArch64 code: cross-compiled, run under qemu-user, held against float64 torch."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse import ops

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-DSTILLHOUSE_ISA=baseline",
    "-static",
]
KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(0.3),
    ops.SkewKL(),
    ops.SkewReverseKL(),
    ops.TVD(),
    ops.TAID(0.4),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(source): the program that a file beside this one is."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

    def build(source):
        binary = tmp_path_factory.mktemp("neon") / "driver"
        source = Path(__file__).with_name(source)
        subprocess.run([COMPILER, *FLAGS, source, "-o", binary], check=True)
        return binary

    return build


@pytest.fixture(scope="module")
def driver(build):
    return build("neon_driver.cpp")


@pytest.mark.parametrize("columns", [7, 49, 5003])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_neon(driver, tmp_path, kind, columns):
    rows = 3
    logits = torch.randn(2, rows, columns) * 3
    logits[:, :, 2] = -torch.inf
    logits.numpy().tofile(tmp_path / "logits.bin")
    arguments = [kind.number, kind.parameters[0], rows, columns]
    command = [EMULATOR, driver, *map(str, arguments), "logits.bin", "result.bin"]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = torch.from_numpy(np.fromfile(tmp_path / "result.bin", dtype=np.float32)).double()

    student = logits[0].double().requires_grad_()
    value = ops.divergence(student, logits[1].double(), kind)
    value.sum().backward()
    torch.testing.assert_close(result[:rows], value, rtol=1e-5, atol=5e-7)
    error = (result[rows:].view(rows, columns) - student.grad).abs().amax()
    assert error < 3e-6 * student.grad.abs().amax() + 3e-7


@pytest.fixture(scope="module")
def quantizer(build):
    return build("neon_rvq_driver.cpp")


@pytest.mark.parametrize(("n", "width", "codes"), [(13, 24, 100), (3, 200, 65), (1, 1, 1)])
def test_neon_quantizer(quantizer, tmp_path, n, width, codes):
    """Codes are those of any instruction set that rounds a product and its sum once."""
    x, tables = torch.randn(n, width), torch.randn(3, codes, width)
    numbers = torch.cat([x.flatten(), tables.flatten()])
    numbers.numpy().tofile(tmp_path / "numbers.bin")
    shape = map(str, (n, width, codes, 3))
    command = [EMULATOR, quantizer, *shape, "numbers.bin", "result.bin"]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = torch.from_numpy(np.fromfile(tmp_path / "result.bin", dtype=np.float32))
    expected, margin = ops.rvq_encode(x.double(), tables.double(), return_margin=True)
    assert (margin > 1e-5).all()
    found = ops.rvq(x.double(), tables.double())
    assert torch.equal(result[: n * 3].view(n, 3).long(), expected)
    torch.testing.assert_close(result[n * 3 :].view(n, 3), found.error.float())


@pytest.fixture(scope="module")
def multiplier(build):
    return build("neon_fdb_driver.cpp")


@pytest.mark.parametrize(
    ("m", "rows", "columns", "group"), [(1, 16, 128, 64), (3, 21, 130, 65), (2, 5, 39, 13)]
)
def test_neon_dual_binary(multiplier, tmp_path, m, rows, columns, group):
    """Products of integers are exact, whether x is float32 or int8."""
    planes, alpha = torch.rand(2, rows, columns) < 0.4, torch.randint(-4, 5, (2, rows, 1)) / 2
    packed = ops.fdb_pack(planes, alpha.expand(2, rows, columns // group).contiguous())
    x, steps = (
        torch.randint(-127, 128, (m, columns)).float(),
        torch.full((m, packed.scales.shape[1]), 0.5),
    )
    packed.tiles.numpy().tofile(tmp_path / "tiles.bin")
    numbers = torch.cat([each.flatten() for each in (x, steps, packed.scales)])
    numbers.numpy().tofile(tmp_path / "numbers.bin")
    arguments = map(str, (m, rows, columns, columns // group))
    command = [EMULATOR, multiplier, *arguments, "tiles.bin", "numbers.bin", "result.bin"]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = torch.from_numpy(np.fromfile(tmp_path / "result.bin", dtype=np.float32))
    weight = (planes * alpha).sum(0)
    exact = x.double() @ weight.double().T
    floats, integers, dense = result.split((m * rows, m * rows, rows * columns))
    assert torch.equal(floats.view(m, rows).double(), exact)
    assert torch.equal(integers.view(m, rows).double(), exact / 2)
    assert torch.equal(dense.view(rows, columns), weight)
