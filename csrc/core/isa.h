// Which instruction set the CPU kernels use. Levels are ordered; a machine has all up to its own.
#pragma once

namespace stillhouse {

enum Isa : int {
  kBaseline = 0,  // SSE2 on x86-64, NEON on AArch64
  kAvx2 = 1,      // AVX2, FMA, F16C
  kAvx512 = 2,    // AVX-512 F, BW, VL, DQ
};

Isa isa();                // the level in use: the machine's best, or what STILLHOUSE_CPU names
Isa best_isa();           // the machine's best among those compiled in
bool set_isa(int level);  // false if the machine does not have it

// Picks a family's table: tables of the levels compiled in, baseline first.
template <class Table>
const Table& by_isa(const Table* const (&tables)[3]) {
  return *tables[isa()];
}

}  // namespace stillhouse
