// Every schema of the library. Arguments are checked in Python; `numbers` holds what may change
// during training, so that nothing recompiles.
#include "core/library.h"

STILLHOUSE_LIBRARY(m) {
  // Instruction-set level of the CPU kernels: -1 asks, another value switches.
  m.def("_cpu_level(int level) -> int");

  // Divergences of rows of logits [..., V] (csrc/divergence). numbers: float64 [11] on the CPU, in the
  // order of problem.h. vocab -1: all columns. stats: [7, ...] or [0]. weight: [...] per row. With ids, int32
  // [..., k], the teacher is log-probabilities [..., k] at these columns (-1: none, -2: of all others);
  // tail: kernel.h.
  m.def(
      "divergence(Tensor student, Tensor? teacher, Tensor numbers, Tensor? mask, Tensor? labels, "
      "int kind, int vocab=-1, bool want_stats=False, int resident_limit=-1, "
      "Tensor? ids=None, int tail=0) "
      "-> (Tensor value, Tensor stats)");
  m.def(
      "divergence_gradient(Tensor student, Tensor? teacher, Tensor numbers, Tensor weight, "
      "Tensor? labels, int kind, int vocab=-1, int resident_limit=-1, "
      "Tensor? ids=None, int tail=0) -> Tensor");
  m.def(
      "divergence_loss(Tensor student, Tensor? teacher, Tensor numbers, Tensor weight, "
      "Tensor? labels, int kind, int vocab=-1, bool want_stats=False, int resident_limit=-1, "
      "Tensor? ids=None, int tail=0) "
      "-> (Tensor loss, Tensor stats, Tensor gradient)");
  m.def(
      "divergence_loss_(Tensor(a!) student, Tensor? teacher, Tensor numbers, Tensor weight, "
      "Tensor? labels, int kind, int vocab=-1, bool want_stats=False, int resident_limit=-1, "
      "Tensor? ids=None, int tail=0) "
      "-> (Tensor loss, Tensor stats)");
  // float64 [6, ...], the numbers of csrc/divergence/state.h.
  m.def("row_state(Tensor student, Tensor? teacher, Tensor numbers, Tensor? mask) -> Tensor");
  // Divergences of a part of the columns, with float64 numbers of whole rows: lse [2, ...] of student and
  // teacher, and for the gradient the sum of the slopes. Gives sums of terms and of slopes, [2, ...].
  m.def(
      "divergence_part(Tensor student, Tensor teacher, Tensor numbers, Tensor lse, int kind) "
      "-> Tensor");
  m.def(
      "divergence_part_gradient(Tensor student, Tensor teacher, Tensor numbers, Tensor lse, "
      "Tensor slope, Tensor weight, int kind) -> Tensor");
  // Of rows [N, V]: int32 [N, k], the columns of the k largest logits, largest first, their
  // log-probabilities [N, k] at this temperature, and the logarithm of what all others have, [N]; of these
  // as many draws, int32 [N, d], as there are numbers in `uniform`, float64 [N, d] in [0, 1), ascending.
  m.def(
      "largest(Tensor logits, int k, float temperature, Tensor? uniform=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Divergences with logits that are products hidden weight^T + bias, made by chunks of rows. Python
  // implements these over the ops above (python/stillhouse/ops/linear_divergence_autograd.py).
#define SH_LINEAR                                                                         \
  "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, " \
  "Tensor? teacher_bias, Tensor? ids, Tensor numbers, Tensor? labels, Tensor? counted, "  \
  "int kind, int tail, int vocab, ScalarType? product, ScalarType? teacher_product, "     \
  "int chunk_rows, "
  m.def("linear_divergence(" SH_LINEAR
        "bool want_stats, bool want_hidden) -> (Tensor value, Tensor stats, Tensor d_hidden)");
  m.def("linear_divergence_gradient(" SH_LINEAR
        "Tensor weight_of_rows, bool want_hidden, bool want_weight, bool want_bias) "
        "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)");
  m.def("linear_divergence_loss(" SH_LINEAR
        "Tensor weight_of_rows, bool want_stats, bool want_hidden, bool want_weight, "
        "bool want_bias) "
        "-> (Tensor loss, Tensor stats, Tensor d_hidden, Tensor d_weight, Tensor d_bias)");
#undef SH_LINEAR
  // Entropic transport of G problems (csrc/sinkhorn): costs [G, n, m], or points [G, n, d] and
  // [G, m, d] with a ground cost. numbers: float64 [5] on the CPU, in the order of problem.h; the
  // other integers are those of kernel.h. lengths: int64 [G, 2]. Gives value, plan, f, g,
  // iterations_used, marginal_error and exponents of every iteration [G, iterations, n + m]; what
  // is not wanted is [0].
  m.def(
      "sinkhorn(Tensor cost, Tensor? other, Tensor? a, Tensor? b, Tensor? lengths, Tensor numbers, "
      "int iterations, int ground, int domain, int objective, int mode, bool want_plan) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // To costs or points, the other points, and marginals.
  m.def(
      "sinkhorn_gradient(Tensor upstream, Tensor cost, Tensor? other, Tensor? a, Tensor? b, "
      "Tensor? lengths, Tensor numbers, Tensor f, Tensor g, Tensor used, Tensor history, "
      "int iterations, int ground, int domain, int objective, int mode, bool want_cost, "
      "bool want_other, bool want_marginals) -> (Tensor, Tensor, Tensor, Tensor)");
  // sum_k |x_ik - y_jk| of rows [G, n, d] and [G, m, d], and its gradient to either side.
  m.def("pairwise_l1(Tensor x, Tensor y) -> Tensor");
  m.def(
      "pairwise_l1_gradient(Tensor upstream, Tensor x, Tensor y, bool want_x, bool want_y) "
      "-> (Tensor, Tensor)");
  // Residual quantization of rows [G, N, D] by tables [G, T, K, D], T = 1 for one that all stages share
  // (csrc/rvq). packed: the tables as the search reads them; sizes: codes that count, int64 [G, T].
  m.def("rvq_pack(Tensor codebooks, Tensor? sizes, int metric) -> Tensor");
  // depth: int64 [G, N], stages of each row. Gives codes int64 [G, N, Q], -1 = none; the sum of the codes
  // [G, N, D], squared distances after each stage [G, N, Q] and how much farther the second nearest
  // code is; what is not wanted is [0]. coupling [G, Q D, Q D]: x and out are [G, N, Q D], a row and a
  // code for each stage, and code numbers j take coupling[j, i] of themselves off later numbers i.
  m.def(
      "rvq_encode(Tensor x, Tensor codebooks, Tensor packed, Tensor? depth, Tensor? coupling, "
      "int stages, bool want_out, bool want_error, bool want_margin) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // The k nearest codes of each row in a table [G, 1, K, D], or with sharpness > 0 those with the highest
  // sharpness score + noise, the noise of (seed, position, node, code): int64 and squared distances
  // [G, N, k].
  m.def(
      "rvq_candidates(Tensor x, Tensor codebooks, Tensor packed, int k, float sharpness, int seed, "
      "int node, Tensor? position) -> (Tensor, Tensor)");
  m.def("rvq_decode(Tensor codes, Tensor codebooks) -> Tensor");
  // Rows and sums of residuals before each stage, of each code: [G, T, K] and [G, T, K, D].
  m.def("rvq_statistics(Tensor x, Tensor codes, Tensor codebooks) -> (Tensor, Tensor)");
  // Of squared distances, to rows and to the tables.
  m.def(
      "rvq_gradient(Tensor upstream, Tensor x, Tensor codes, Tensor codebooks, bool want_x, "
      "bool want_codebooks) -> (Tensor, Tensor)");
  // Products of rows [M, K] with dual-binary weights [N, K] (csrc/dual_binary): tiles int32
  // [N / 16, g, words, 2, 16] and scales [N / 16, g, 2, 16] as in kernel.h. Sums are float32, or float64
  // where x is; y has the dtype of x.
  m.def("fdb_matmul(Tensor x, Tensor tiles, Tensor scales, Tensor? bias, int rows) -> Tensor");
  // Of int8 rows, number i of group j worth steps[., j] i; steps float32 [M, g].
  m.def(
      "fdb_matmul_int8(Tensor x, Tensor steps, Tensor tiles, Tensor scales, Tensor? bias, int "
      "rows, "
      "ScalarType dtype) -> Tensor");
  // int8 [M, K] to nearest, ties to even, and steps: a group's largest number / 127.
  m.def("fdb_quantize(Tensor x, int groups) -> (Tensor, Tensor)");
  m.def(
      "fdb_dequantize(Tensor tiles, Tensor scales, int rows, int columns, ScalarType dtype) "
      "-> Tensor");
  // To x, in its dtype, and to the scales, in that of sums.
  m.def(
      "fdb_gradient(Tensor upstream, Tensor x, Tensor tiles, Tensor scales, bool want_x, "
      "bool want_scales) -> (Tensor, Tensor)");
  // A contiguous copy, on the CPU in huge pages.
  m.def("in_huge_pages(Tensor x) -> Tensor");
  // Trees of drafted tokens (csrc/tree): parents int32 [B, T], node 0 the root (-1), padded nodes -2. Gives
  // first children, next siblings, depths [B, T] (-1: none), ancestors with the node itself as bits of int64
  // [B, T, ceil(T / 64)], and the first node with a wrong parent [B], -1: none.
  m.def("tree_build(Tensor parents) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // target and draft [B, T, V]; kind uint8 [B, T]; temperature float64 [B]; seed, position int64 [B]; coins
  // float64 [B, T, 2] in the place of Philox's; mode: kernel.h. Gives the number of accepted tokens, their
  // nodes [B, D + 1] from the root on, the tokens and the one after them [B, D + 1], the probability that
  // the last one was accepted with, and status bits.
  m.def(
      "tree_verify(Tensor tokens, Tensor parents, Tensor first_child, Tensor next_sibling, Tensor "
      "target, "
      "Tensor? draft, Tensor? kind, Tensor? temperature, Tensor seed, Tensor position, Tensor? "
      "coins, "
      "int mode, bool is_prob, float epsilon, float delta) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  // gradient *= upstream, a scalar; returns at once when that is 1.
  m.def("scale_(Tensor(a!) gradient, Tensor upstream) -> ()");
}
