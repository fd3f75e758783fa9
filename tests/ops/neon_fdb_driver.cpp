// Multiplies rows from files with the kernels of one instruction set, outside torch:
//   neon_fdb_driver M ROWS COLUMNS GROUPS tiles.bin numbers.bin result.bin
// numbers.bin: rows of x, steps, scales, float32. result.bin: the product, that of x as int8, and W.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/dual_binary/cpu.cpp"

int main(int argc, char** argv) {
  using namespace stillhouse;
  if (argc != 8) return 2;
  FdbWeight w{};
  const int64_t m = std::atoll(argv[1]);
  w.rows = std::atoll(argv[2]), w.columns = std::atoll(argv[3]), w.groups = std::atoll(argv[4]);
  std::vector<uint32_t> tiles(w.blocks() * w.words() * 2 * kBlock);
  std::vector<float> numbers(m * (w.columns + w.groups) + w.scales_at(w.blocks(), 0));
  const auto read = [](const char* name, auto& to) {
    std::FILE* file = std::fopen(name, "rb");
    const bool whole = file != nullptr && std::fread(to.data(), 4, to.size(), file) == to.size();
    return whole && std::fclose(file) == 0;
  };
  if (!read(argv[5], tiles) || !read(argv[6], numbers)) return 3;
  w.tiles = tiles.data(), w.scale_dtype = Dtype::f32;
  w.scales = reinterpret_cast<const char*>(numbers.data() + m * (w.columns + w.groups));

  const FdbKernels& kernels = STILLHOUSE_ISA::fdb_kernels;
  std::vector<int8_t> integers(numbers.begin(), numbers.begin() + m * w.columns);
  std::vector<float> result(2 * m * w.rows + w.rows * w.columns);
  FdbProduct p{};
  p.weight = w, p.m = m, p.dtype = Dtype::f32;
  p.x = reinterpret_cast<const char*>(numbers.data());
  for (int i = 0; i < 2; ++i) {
    std::vector<char> tables(m * kernels.table_bytes(p));
    p.y = reinterpret_cast<char*>(result.data() + i * m * w.rows);
    kernels.tables(p, 0, m, 0, tables.data());
    kernels.product(p, tables.data(), 0, m, 0, w.blocks(), false);
    p.x = nullptr, p.integers = integers.data(), p.steps = numbers.data() + m * w.columns;
  }
  char* const numbers_of_w = reinterpret_cast<char*>(result.data() + 2 * m * w.rows);
  kernels.dequantize({w, 0, w.rows, 0, w.groups, numbers_of_w, Dtype::f32}, 0, w.blocks());

  std::FILE* file = std::fopen(argv[7], "wb");
  if (file == nullptr || std::fwrite(result.data(), 4, result.size(), file) != result.size())
    return 4;
  return std::fclose(file);
}
