// The namespace that ops are registered in. The CUDA sources compiled for the executor of tests/simt have
// one of their own, in which they are the CPU's kernels.
#pragma once
#include <torch/csrc/stable/library.h>

#if defined(STILLHOUSE_SIMT)
#define STILLHOUSE_LIBRARY(m) STABLE_TORCH_LIBRARY(stillhouse_simt, m)
#define STILLHOUSE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(stillhouse_simt, CPU, m)
#else
#define STILLHOUSE_LIBRARY(m) STABLE_TORCH_LIBRARY(stillhouse, m)
#define STILLHOUSE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(stillhouse, CUDA, m)
#endif
