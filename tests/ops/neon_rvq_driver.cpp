// Quantizes rows from a file with the kernels of one instruction set, outside torch:
//   neon_rvq_driver ROWS WIDTH CODES STAGES numbers.bin result.bin
// numbers.bin: rows, then tables, float32. result.bin: codes and squared distances, float32.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/rvq/cpu.cpp"

int main(int argc, char** argv) {
  using namespace stillhouse;
  if (argc != 7) return 2;
  const int64_t n = std::atoll(argv[1]), width = std::atoll(argv[2]);
  const int64_t codes = std::atoll(argv[3]), stages = std::atoll(argv[4]);
  std::vector<float> numbers(n * width + stages * codes * width);
  std::FILE* in = std::fopen(argv[5], "rb");
  if (in == nullptr || std::fread(numbers.data(), 4, numbers.size(), in) != numbers.size())
    return 3;
  std::fclose(in);

  const RvqSteps<float>& step = STILLHOUSE_ISA::rvq_kernels.f32;
  const auto room = [](int64_t count) {
    return static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
  };
  float* const packed = room(stages * code_blocks(codes) * block_numbers(width));
  Packing<float> p{};
  p.tables = stages, p.codes = codes, p.width = width;
  p.table = numbers.data() + n * width, p.metric = kEuclidean, p.packed = packed;
  step.pack(p, 0, stages * code_blocks(codes));

  std::vector<int64_t> found(n * stages);
  std::vector<float> error(n * stages), out(n * width);
  Quantizer<float> q{};
  q.groups = 1, q.n = n, q.width = width, q.codes = codes, q.tables = q.stages = stages;
  q.x = reinterpret_cast<const char*>(numbers.data()), q.x_dtype = Dtype::f32;
  q.table = p.table, q.packed = packed;
  q.found = found.data(), q.out = out.data(), q.error = error.data();
  Tile<float> tile{};
  tile.rows = n, tile.parts = 1;
  tile.residual = room(n * width), tile.score = room(n * step.lanes);
  tile.place = reinterpret_cast<int32_t*>(room(n * step.lanes));
  tile.waiting = room(n * kCodes);
  step.begin(q, tile, 0, n);
  for (int64_t stage = 0; stage < stages; ++stage) {
    step.search(q, tile, stage, 0, 0, code_blocks(codes));
    step.settle(q, tile, stage, 0, n);
  }

  std::vector<float> result(found.begin(), found.end());
  result.insert(result.end(), error.begin(), error.end());
  std::FILE* file = std::fopen(argv[6], "wb");
  if (file == nullptr || std::fwrite(result.data(), 4, result.size(), file) != result.size())
    return 4;
  return std::fclose(file);
}
