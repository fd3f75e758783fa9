"""Shared by the tests of the ops: every way that a kernel is run."""

import pytest
import torch

from stillhouse import ops


def _use(kernels, request):
    """The CUDA kernels on the executor or, with --device cuda, on a GPU with tensors there."""
    if kernels == "simt":
        request.getfixturevalue("simt")
    elif kernels == "cuda":
        request.getfixturevalue("on_cuda")


@pytest.fixture
def on_cuda():
    """Tensors are made on the GPU."""
    with torch.device("cuda"):
        yield


@pytest.fixture(params=["cpu", "cuda"], ids=lambda name: f"device-{name}")
def device(request):
    """Where tensors are made, for what is no kernel's own."""
    _use(request.param, request)
    return request.param


@pytest.fixture(params=["cpu", "simt", "cuda"], ids=lambda name: f"kernels-{name}")
def kernels(request):
    """The CPU's kernels, or those of CUDA."""
    _use(request.param, request)
    return request.param


@pytest.fixture(params=[*range(ops.cpu_level() + 1), "simt", "cuda"], ids=lambda n: f"level{n}")
def level(request):
    """An instruction set of the CPU, or the CUDA kernels."""
    if isinstance(request.param, str):
        _use(request.param, request)
        yield request.param
        return
    best = ops.cpu_level()
    ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)


class DualBinary:
    """Problems with dual-binary weights, and what they come to in float64."""

    @staticmethod
    def draw(*shape, seed, dtype=torch.float32, integers=False):
        """Normal numbers, or integers from -4 to 4; the same on every device."""
        like = dict(generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        if integers:
            drawn = torch.randint(-4, 5, shape, **like)
        else:
            drawn = torch.randn(*shape, dtype=torch.float64, **like)
        return drawn.to(torch.get_default_device(), dtype)

    @classmethod
    def weight(cls, rows, columns, group, *, dtype=torch.float16, seed=0, integers=False):
        """Planes bool [2, N, K], one of four bits a one, and alpha [2, N, K / G] of either sign."""
        planes = cls.draw(2, rows, columns, seed=seed) > 0.6
        alpha = cls.draw(2, rows, columns // group, seed=seed + 1, dtype=dtype, integers=integers)
        return planes, alpha

    @staticmethod
    def dense(planes, alpha):
        """Float64 [2, N, K]: what each plane adds."""
        groups = planes.unflatten(2, (alpha.shape[2], -1)).double()
        return (groups * alpha.double()[..., None]).flatten(2)

    @classmethod
    def product(cls, x, planes, alpha, bias=None):
        """y in float64, and the sum of the sizes of all addends, by which rounding is measured."""
        parts, x = cls.dense(planes, alpha), x.double()
        bias = torch.zeros(planes.shape[1]) if bias is None else bias
        y = x @ parts.sum(0).T + bias.double()
        return y, x.abs() @ parts.abs().sum(0).T + bias.double().abs()

    @staticmethod
    def assert_rounded(found, exact, size, terms, dtype):
        """A sum of so many terms in float32 (float64) with error 4 eps sqrt(terms) of their size;
        with 16 bits also numbers that were rounded once before they were multiplied."""
        sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        allowed = 4 * sums * max(terms, 1) ** 0.5 * size
        if dtype.itemsize == 2:
            allowed = allowed + torch.finfo(dtype).eps / 2 * (size + exact.abs())
            allowed = allowed + torch.finfo(dtype).smallest_normal
        gap = (found.double() - exact).abs()
        assert (gap <= allowed).all(), (gap - allowed).max().item()


@pytest.fixture
def dual_binary():
    return DualBinary
