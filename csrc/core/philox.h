// Philox4x32-10 (Salmon et al., 2011): random words that depend on a seed and on where they are used alone,
// so that a draw is the same in any batch, on any thread, on any device.
#pragma once
#include "scalar.h"

namespace stillhouse {

struct Words4 {
  uint32_t word[4];
};

// The words of a seed at (position, node, stream).
SH_INLINE Words4 philox(uint64_t seed, uint64_t position, uint32_t node, uint32_t stream) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  Words4 c{{uint32_t(position), uint32_t(position >> 32), node, stream}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.word[0], b = uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{uint32_t(b >> 32) ^ c.word[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c.word[3] ^ key1,
          uint32_t(a)}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return c;
}

// In (0, 1), of 53 bits; never 0, and 1 once in 2^53, by rounding.
SH_INLINE double uniform(Words4 words) {
  const uint64_t bits = uint64_t(words.word[0]) << 21 | words.word[1] >> 11;
  return (double(bits) + 0.5) * 0x1p-53;
}

// -log(-log u) for u = (word + 1/2) / 2^32.
constexpr double kMostGumbel = 22.9;
SH_INLINE double gumbel_of(uint32_t word) {
  const double u = (double(word) + 0.5) * 0x1p-32;
  return -fast_log(-fast_log(u));
}

}  // namespace stillhouse
