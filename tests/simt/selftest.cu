// Kernels that are right, and kernels each broken in one way: what the executor must say of them.
//   selftest NAME [SEED]    exit 0: ran, 1: a wrong result, 3: the executor refused (its words on stderr)
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "csrc/core/block.cuh"
#include "csrc/core/tile.cuh"

using namespace stillhouse;

namespace {

void launch(dim3 grid, dim3 block, const std::function<void()>& body, size_t dynamic = 0) {
  simt::Launch l;
  l.grid = grid;
  l.block = block;
  l.dynamic_shared = dynamic;
  simt::run(l, "selftest", body);
}

bool expect(bool holds, const char* what) {
  if (!holds) std::fprintf(stderr, "wrong: %s\n", what);
  return holds;
}

// ---- right ----

__global__ void sum_kernel(const int* x, int n, double* out) {
  double sum[1] = {0};
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum[0] += x[i];
  Team<128>::reduce(sum, Add());
  Team<128>::reduce(sum, Largest());  // the same shared array once more
  out[threadIdx.x] = sum[0];
}

bool reduction() {
  std::vector<int> x(1000);
  for (int i = 0; i < 1000; ++i) x[i] = i;
  std::vector<double> out(128, -1);
  launch(1, 128, [&] { sum_kernel(x.data(), 1000, out.data()); });
  bool same = true;
  for (double v : out) same = same && v == 499500;
  return expect(same, "a block's sum");
}

__global__ void index_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}

bool indices() {
  std::vector<int> out(2 * 3 * 4 * 5 * 2 * 3, 0);
  launch(dim3(2, 3, 4), dim3(5, 2, 3), [&] { index_kernel(out.data()); });
  bool right = true;
  for (int i = 0; i < int(out.size()); ++i) right = right && out[i] == i / 30 * 1000 + i % 30;
  return expect(right, "indices in three dimensions");
}

__global__ void votes_kernel(uint32_t* out) {
  const int lane = threadIdx.x % 32;
  const uint32_t odd = __ballot_sync(kFullMask, lane % 2 == 1);
  const bool any = __any_sync(kFullMask, lane == 7), all = __all_sync(kFullMask, lane < 31);
  const uint32_t same = __match_any_sync(kFullMask, lane / 8);
  const int up = __shfl_up_sync(kFullMask, lane, 3), down = __shfl_down_sync(kFullMask, lane, 3, 8);
  const int at = __shfl_sync(kFullMask, lane, 5), across = __shfl_xor_sync(kFullMask, lane, 16);
  const int count = __syncthreads_count(lane < 4);
  const bool every = __syncthreads_and(lane < 32), some = __syncthreads_or(lane == 99);
  const bool right = odd == 0xaaaaaaaau && any && !all && same == 0xffu << (lane / 8 * 8) &&
                     up == (lane < 3 ? lane : lane - 3) &&
                     down == (lane % 8 < 5 ? lane + 3 : lane) && at == 5 && across == (lane ^ 16) &&
                     count == 8 && every && !some;
  out[threadIdx.x] = right;
}

bool votes() {
  std::vector<uint32_t> out(64, 0);
  launch(1, 64, [&] { votes_kernel(out.data()); });
  bool right = true;
  for (uint32_t v : out) right = right && v == 1;
  return expect(right, "votes, shuffles and counting barriers");
}

__global__ void atomics_kernel(int* sum, double* total, int* largest) {
  SHARED_ARRAY(int, local, 1);
  if (threadIdx.x == 0) local[0] = 0;
  __syncthreads();
  atomicAdd<simt::Shared<int>::Ref, int>(local[0], 1);
  atomicAdd(total, 0.5);
  atomicMax(largest, int(blockIdx.x * 100 + threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, int(local[0]));
}

bool atomics() {
  int sum = 0, largest = 0;
  double total = 0;
  launch(20, 64, [&] { atomics_kernel(&sum, &total, &largest); });
  return expect(sum == 1280 && total == 640 && largest == 1963, "atomics");
}

// One tile product of small whole numbers, which every format holds exactly, against plain loops. The
// fragments are filled as PTX documents them for this shape.
template <class Format, class Pack>
__global__ void mma_kernel(const int* A, const int* B, Pack pack, double* D) {
  constexpr int e = Format::kElements, K = 8 * e;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4] = {}, b[2] = {};
  for (int j = 0; j < e; ++j) {
    a[0] |= pack(A[g * K + t * e + j], j);
    a[1] |= pack(A[(g + 8) * K + t * e + j], j);
    a[2] |= pack(A[g * K + t * e + K / 2 + j], j);
    a[3] |= pack(A[(g + 8) * K + t * e + K / 2 + j], j);
    b[0] |= pack(B[(t * e + j) * 8 + g], j);
    b[1] |= pack(B[(t * e + K / 2 + j) * 8 + g], j);
  }
  typename Format::Sum d[4] = {1, 2, 3, 4};
  mma<Format>(d, a, b);
  D[g * 8 + 2 * t] = d[0] - 1;
  D[g * 8 + 2 * t + 1] = d[1] - 2;
  D[(g + 8) * 8 + 2 * t] = d[2] - 3;
  D[(g + 8) * 8 + 2 * t + 1] = d[3] - 4;
}

template <class Format, class Pack>
bool tile(int low, int high, Pack pack) {
  constexpr int K = 8 * Format::kElements;
  std::vector<int> A(16 * K), B(K * 8);
  unsigned state = 1;
  const auto next = [&] {
    return low + int((state = state * 1664525u + 1013904223u) >> 20) % (high - low + 1);
  };
  for (int& x : A) x = next();
  for (int& x : B) x = next();
  std::vector<double> D(16 * 8);
  launch(1, 32, [&] { mma_kernel<Format>(A.data(), B.data(), pack, D.data()); });
  bool right = true;
  for (int i = 0; i < 16; ++i) {
    for (int n = 0; n < 8; ++n) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += A[i * K + k] * B[k * 8 + n];
      right = right && D[i * 8 + n] == sum;
    }
  }
  return right;
}

bool tiles() {
  const auto bf16 = [](int x, int j) { return as_bits(float(x)) >> 16 << (16 * j); };
  const auto fp16 = [](int x, int j) {
    Fp16 h;
    narrow(float(x), h);
    return uint32_t(h.bits) << (16 * j);
  };
  const auto tf32 = [](int x, int) { return as_bits(float(x)) | 1; };  // a bit that must not count
  const auto int8 = [](int x, int j) { return uint32_t(uint8_t(x)) << (8 * j); };
  const auto bit = [](int x, int j) { return uint32_t(x) << j; };
  return expect(tile<MmaBf16>(-9, 9, bf16), "bf16") && expect(tile<MmaFp16>(-9, 9, fp16), "fp16") &&
         expect(tile<MmaTf32>(-9, 9, tf32), "tf32") &&
         expect(tile<MmaInt8>(-128, 127, int8), "int8") && expect(tile<MmaBit>(0, 1, bit), "bits");
}

__global__ void copy_kernel(const float* x, float* out, bool wait) {
  SHARED_ARRAY(float, cell, 128);
  copy_async<float>(cell + 4 * threadIdx.x, x + 4 * threadIdx.x);
  copy_async_commit();
  copy_async<float>(cell + 64 + 4 * threadIdx.x, x + 64 + 4 * threadIdx.x);
  copy_async_commit();
  copy_async_wait<1>();
  float sum = cell[4 * threadIdx.x];
  if (wait) copy_async_wait<0>();
  sum += cell[64 + 4 * threadIdx.x];
  copy_async_wait<0>();
  out[threadIdx.x] = sum;
}

bool async_copies(bool wait) {
  alignas(16) static float x[128];
  float out[16];
  for (int i = 0; i < 128; ++i) x[i] = float(i);
  launch(1, 16, [&] { copy_kernel(x, out, wait); });
  bool right = true;
  for (int i = 0; i < 16; ++i) right = right && out[i] == float(8 * i + 64);
  return expect(right, "asynchronous copies");
}

__constant__ float kWeights[4] = {1, 2, 4, 8};

__global__ void dynamic_kernel(const float* x, float* out) {
  SHARED_DYNAMIC(float, cell);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) cell[i] = __ldg(x + i) * kWeights[i % 4];
  __syncthreads();
  out[threadIdx.x] = cell[255 - threadIdx.x];
}

bool dynamic(size_t bytes) {
  std::vector<float> x(256, 1.f), out(32, 0.f);
  launch(1, 32, [&] { dynamic_kernel(x.data(), out.data()); }, bytes);
  bool right = true;
  for (int i = 0; i < 32; ++i) right = right && out[i] == float(8 >> i % 4);
  return expect(right, "dynamic shared memory");
}

// ---- broken ----

__global__ void neighbour_kernel(int* out, bool barrier) {
  SHARED_ARRAY(int, cell, 64);
  cell[threadIdx.x] = int(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = cell[(threadIdx.x + 1) % 64];
}

__global__ void warp_neighbour_kernel(int* out, bool sync) {
  SHARED_ARRAY(int, cell, 32);
  cell[threadIdx.x] = int(threadIdx.x);
  if (sync) __syncwarp(kFullMask);
  const int value = cell[(threadIdx.x + 1) % 32];
  out[threadIdx.x] = value;
}

__global__ void rewrite_kernel(int* out) {  // the second write may overtake the read
  SHARED_ARRAY(int, cell, 64);
  cell[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cell[63 - threadIdx.x];
  cell[threadIdx.x] = 2;
}

__global__ void global_kernel(int* cell, int* out) {
  cell[threadIdx.x] = int(threadIdx.x) + 1;
  out[threadIdx.x] = cell[(threadIdx.x + 1) % 64];
}

bool on_64(const std::function<void(int*)>& body) {
  std::vector<int> out(64, 0);
  launch(1, 64, [&] { body(out.data()); });
  return true;
}
bool on_32(const std::function<void(int*)>& body) {
  std::vector<int> out(32, 0);
  launch(1, 32, [&] { body(out.data()); });
  return true;
}

const std::map<std::string, bool (*)()>& cases() {
  static const std::map<std::string, bool (*)()> table = {
      {"reduction", reduction},
      {"indices", indices},
      {"votes", votes},
      {"atomics", atomics},
      {"tiles", tiles},
      {"dynamic_shared", [] { return dynamic(1024); }},
      {"async_copies", [] { return async_copies(true); }},
      {"barrier", [] { return on_64([](int* out) { neighbour_kernel(out, true); }); }},
      {"warp_sync", [] { return on_32([](int* out) { warp_neighbour_kernel(out, true); }); }},

      {"missing_barrier", [] { return on_64([](int* out) { neighbour_kernel(out, false); }); }},
      {"missing_warp_sync",
       [] { return on_32([](int* out) { warp_neighbour_kernel(out, false); }); }},
      {"missing_barrier_before_reuse", [] { return on_64(rewrite_kernel); }},
      {"missing_barrier_on_global_memory",
       [] {
         std::vector<int> cell(64, 0), out(64, 0);
         launch(1, 64, [&] { global_kernel(cell.data(), out.data()); });
         bool right = true;
         for (int i = 0; i < 64; ++i) right = right && out[i] == (i + 1) % 64 + 1;
         return expect(right, "the neighbour's number");
       }},
      {"divergent_barrier",
       [] {
         return on_64([](int*) {
           if (threadIdx.x < 40) __syncthreads();
         });
       }},
      {"two_barriers",
       [] {
         return on_64([](int*) {
           if (threadIdx.x < 40) {
             __syncthreads();
           } else {
             __syncthreads();
           }
         });
       }},
      {"early_return",
       [] {
         return on_64([](int*) {
           if (threadIdx.x == 63) return;
           __syncthreads();
         });
       }},
      {"mask_leaves_itself_out",
       [] { return on_32([](int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1); }); }},
      {"lane_does_not_come",
       [] {
         return on_32([](int* out) {
           if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1, 1);
         });
       }},
      {"lane_of_another_mask",
       [] {
         return on_32([](int* out) {
           if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
         });
       }},
      {"different_masks",
       [] {
         return on_32([](int* out) {
           out[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 16 ? kFullMask : 0xffff0000u, 1, 1);
         });
       }},
      {"shared_overrun",
       [] {
         return on_64([](int* out) {
           SHARED_ARRAY(int, cell, 32);
           cell[threadIdx.x] = 1;
           out[threadIdx.x] = 1;
         });
       }},
      {"dynamic_shared_overrun", [] { return dynamic(1000); }},
      {"uninitialised_shared",
       [] {
         return on_64([](int* out) {
           SHARED_ARRAY(int, cell, 64);
           if (threadIdx.x != 5) cell[threadIdx.x] = 1;
           out[threadIdx.x] = cell[threadIdx.x];
         });
       }},
      {"uninitialised_output",
       [] {
         std::vector<float> out(64);
         simt::poison(out.data(), out.size() * sizeof(float));
         launch(1, 64, [&] {
           if (threadIdx.x != 5) out[threadIdx.x] = 1;
         });
         float sum = 0;
         for (float v : out) sum += v;
         return expect(sum == 64, "a sum over outputs");
       }},
      {"too_many_threads",
       [] {
         launch(1, 1056, [] {});
         return true;
       }},
      {"no_block",
       [] {
         launch(0, 32, [] {});
         return true;
       }},
      {"deep_block",
       [] {
         launch(1, dim3(1, 1, 65), [] {});
         return true;
       }},
      {"wide_grid",
       [] {
         launch(dim3(1, 65536), 1, [] {});
         return true;
       }},
      {"too_much_shared",
       [] {
         return on_64([](int*) {
           SHARED_ARRAY(double, cell, 7000);
           (void)cell;
         });
       }},
      {"too_much_dynamic_shared",
       [] {
         launch(1, 32, [] {}, 64 << 10);
         return true;
       }},
      {"copy_not_waited_for", [] { return async_copies(false); }},
      {"tile_without_a_lane",
       [] {
         return on_32([](int*) {
           float d[4] = {};
           const uint32_t a[4] = {}, b[2] = {};
           if (threadIdx.x > 0) mma<MmaBf16>(d, a, b);
         });
       }},
      {"misaligned_vector",
       [] {
         alignas(16) static float data[64];
         return on_32([](int* out) { out[threadIdx.x] = int(load_vector(data + 1).get(0)); });
       }},
      {"out_of_bounds",
       [] {
         std::vector<float> data(64, 1.f);
         std::vector<float> out(64, 0.f);
         launch(1, 64, [&] { out[threadIdx.x] = data.data()[threadIdx.x + 1]; });
         return true;
       }},
      {"use_after_free",
       [] {
         auto* data = new float[64]();
         delete[] data;
         launch(1, 64, [&] { data[threadIdx.x] = 1; });
         return true;
       }},
      {"shift_too_far",
       [] {
         return on_64([](int* out) {
           volatile int by = int(threadIdx.x);
           out[threadIdx.x] = 1 << by;
         });
       }},
  };
  return table;
}

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc > 1 ? cases().find(argv[1]) : cases().end();
  if (found == cases().end()) {
    for (const auto& [name, run] : cases()) std::puts(name.c_str());
    return 2;
  }
  if (argc > 2) simt::set_seed(std::strtoull(argv[2], nullptr, 10));
  try {
    return found->second() ? 0 : 1;
  } catch (const simt::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
