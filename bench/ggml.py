"""llama.cpp's product of rows with weights of two bits (Q2_K), through its own library.

A call is one graph with a product for each matrix, as a model is computed there: threads are made
once a graph, as without a pool of the caller's, and spin between its products. Rows of x are
quantized to 8 bits within each product.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, byref, c_bool, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path

import torch
from torch import Tensor

F32, Q2_K = 0, 10


class _Memory(ctypes.Structure):
    _fields_ = (("bytes", c_size_t), ("buffer", c_void_p), ("no_data", c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_bytes", c_size_t),
        ("work", POINTER(c_uint8)),
        ("threads", c_int),
        ("pool", c_void_p),
        ("abort", c_void_p),
        ("abort_data", c_void_p),
        ("reference", c_bool),
    )


def folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries, or None without it."""
    found = importlib.util.find_spec("llama_cpp")
    return Path(found.origin).parent / "lib" if found else None


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    base, cpu = (ctypes.CDLL(str(folder() / f"libggml-{name}.so")) for name in ("base", "cpu"))
    pointer, number = c_void_p, c_int64
    signatures = {
        "ggml_init": (pointer, _Memory),
        "ggml_new_tensor_2d": (pointer, pointer, c_int, number, number),
        "ggml_get_data": (pointer, pointer),
        "ggml_mul_mat": (pointer, pointer, pointer, pointer),
        "ggml_new_graph_custom": (pointer, pointer, c_size_t, c_bool),
        "ggml_build_forward_expand": (None, pointer, pointer),
        "ggml_free": (None, pointer),
        "ggml_quantize_chunk": (
            *(c_size_t, c_int, POINTER(c_float), pointer),
            *(number, number, number, POINTER(c_float)),
        ),
    }
    for name, (result, *arguments) in signatures.items():
        getattr(base, name).restype, getattr(base, name).argtypes = result, arguments
    cpu.ggml_graph_plan.restype, cpu.ggml_graph_plan.argtypes = _Plan, [pointer, c_int, pointer]
    cpu.ggml_graph_compute.restype = c_int
    cpu.ggml_graph_compute.argtypes = [pointer, POINTER(_Plan)]
    cpu.ggml_cpu_init()
    return base, cpu


class Products:
    """x [M, K] times each of `count` copies of a weight [N, K], quantized to Q2_K.

    Called without arguments it computes all products; `first()` is the first of them, [M, N].
    """

    def __init__(self, x: Tensor, weight: Tensor, count: int):
        self._base, self._cpu = _libraries()
        (m, k), n = x.shape, len(weight)
        of_weight, of_rows = n * k // 256 * 84, 4 * m * (k + count * n)
        memory = _Memory(count * (of_weight + 4096) + of_rows + (8 << 20), None, False)
        self._context = self._base.ggml_init(memory)
        rows = self._base.ggml_new_tensor_2d(self._context, F32, k, m)
        ctypes.memmove(self._data(rows), x.contiguous().data_ptr(), 4 * m * k)
        graph = self._base.ggml_new_graph_custom(self._context, 4 * count + 16, False)
        numbers = ctypes.cast(weight.contiguous().data_ptr(), POINTER(c_float))
        results, packed = [], None
        for _ in range(count):
            matrix = self._base.ggml_new_tensor_2d(self._context, Q2_K, k, n)
            if packed is None:
                packed = self._data(matrix)
                self._base.ggml_quantize_chunk(Q2_K, numbers, packed, 0, n, k, None)
            else:
                ctypes.memmove(self._data(matrix), packed, of_weight)
            results.append(self._base.ggml_mul_mat(self._context, matrix, rows))
            self._base.ggml_build_forward_expand(graph, results[-1])
        self._graph, self._result, self._shape = graph, results[0], (m, n)
        self._plan = self._cpu.ggml_graph_plan(graph, torch.get_num_threads(), None)
        self._work = (c_uint8 * max(1, self._plan.work_bytes))()
        self._plan.work = ctypes.cast(self._work, POINTER(c_uint8))

    def _data(self, tensor: int) -> int:
        return self._base.ggml_get_data(tensor)

    def __call__(self) -> None:
        if self._cpu.ggml_graph_compute(self._graph, byref(self._plan)) != 0:
            raise RuntimeError("ggml could not compute its graph")

    def first(self) -> Tensor:
        numbers = (c_float * (self._shape[0] * self._shape[1])).from_address(
            self._data(self._result)
        )
        return torch.tensor(numbers).view(self._shape)

    def __del__(self) -> None:
        self._base.ggml_free(self._context)
