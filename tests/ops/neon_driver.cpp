// Runs the divergence kernels of one instruction set on rows from a file, outside torch:
//   neon_driver KIND A ROWS COLUMNS logits.bin result.bin
// logits.bin: student then teacher, float32. result.bin: values, then the gradient, float32.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/divergence/cpu.cpp"
#include "../../csrc/divergence/series.h"

int main(int argc, char** argv) {
  using namespace stillhouse;
  if (argc != 7) return 2;
  const int kind = std::atoi(argv[1]);
  const int64_t rows = std::atoll(argv[3]), columns = std::atoll(argv[4]);
  std::vector<float> logits(2 * rows * columns), gradient(rows * columns), value(rows);
  std::FILE* in = std::fopen(argv[5], "rb");
  if (in == nullptr || std::fread(logits.data(), 4, logits.size(), in) != logits.size()) return 3;
  std::fclose(in);

  const auto as_rows = [&](float* data) {
    return Rows{reinterpret_cast<char*>(data), Dtype::f32, 1, {rows}, {columns * 4}};
  };
  Problem<float> problem{};
  problem.student = {as_rows(logits.data()), 1, 0, 1};
  problem.teacher = {as_rows(logits.data() + rows * columns), 1, 0, 1};
  problem.vocab = problem.width = columns;
  problem.kind = kind;
  set_params(kind, std::atof(argv[2]), 0, problem.params);
  problem.factor = 1;
  problem.rows = rows;
  problem.resident_limit = 1 << 18;
  problem.short_limit = STILLHOUSE_ISA::divergence_kernels.short_limit;
  problem.value = value.data();
  problem.gradient = as_rows(gradient.data());
  std::vector<char> scratch(scratch_bytes(problem));
  STILLHOUSE_ISA::divergence_kernels.f32(problem, 0, rows, scratch.data());

  std::FILE* out = std::fopen(argv[6], "wb");
  if (out == nullptr || std::fwrite(value.data(), 4, value.size(), out) != value.size() ||
      std::fwrite(gradient.data(), 4, gradient.size(), out) != gradient.size())
    return 4;
  return std::fclose(out);
}
