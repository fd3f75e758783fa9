// A row pair in the hands of a team of threads: its chunks, and where they stay from pass to pass.
#pragma once
#include "../core/block.cuh"
#include "../core/tile.cuh"
#include "side.cuh"

namespace stillhouse {

// Where a row pair stays: in registers beside its exponentials, so that these are taken once; in shared
// memory as it came, which holds three times as many columns as with exponentials; nowhere, so that
// every pass reads it again and finds it in L2 at best.
enum class Hold { registers, shared, nothing };

// Elements of each side that a thread holds in registers, beside their exponentials.
constexpr int kHeld = 8;

// Chunks of a row of so many columns, wherever it starts.
template <class In>
SH_INLINE int most_chunks(int vocab) {
  return (vocab + 2 * kChunk<In> - 2) / kChunk<In>;
}
// Bytes of shared memory that hold both sides of a row.
template <class In>
SH_INLINE size_t pair_bytes(int vocab) {
  return size_t(2) * 16 * size_t(most_chunks<In>(vocab));
}

// Both sides of a row, cut into chunks of 16 bytes of the student.
template <class Real, class In, bool kPlain, bool kTeacher>
struct RowPair {
  using Side = DeviceSide<In, Real, kPlain>;
  static constexpr int kSize = kChunk<In>;

  Side student, teacher;
  int origin = 0, chunks = 0;  // the column of the first chunk, at most 0

  RowPair() = default;
  __device__ RowPair(const Problem<Real>& problem, int64_t r)
      : student(problem.student, r, int(problem.vocab)) {
    const int head = student.head();
    origin = head > 0 ? head - kSize : 0;
    chunks = (student.vocab - origin + kSize - 1) / kSize;
    student.aligned = Side::on_16_bytes(student.row, origin);
    if constexpr (kTeacher) {
      const bool is_student = problem.kind == kTAID && problem.params.a == 0;
      teacher = Side(is_student ? problem.student : problem.teacher, r, int(problem.vocab));
      teacher.aligned = Side::on_16_bytes(teacher.row, origin);
    }
  }
};

template <class Real, class In, int kThreads, Hold kHold, bool kPlain, bool kTeacher>
struct HeldRow : RowPair<Real, In, kPlain, kTeacher> {
  using Pair = RowPair<Real, In, kPlain, kTeacher>;
  using T = Team<kThreads>;
  using Pair::kSize, Pair::student, Pair::teacher, Pair::origin, Pair::chunks;
  using typename Pair::Side;
  static constexpr bool kRegisters = kHold == Hold::registers;
  static constexpr int kSlots = kRegisters ? kHeld / kSize : 1;  // chunks a thread holds
  // Chunks come to shared memory in so many groups, and are worked on as these come.
  static constexpr int kGroups = 4;
  // Chunks that a thread works on are asked for while it works on others; where nothing is held, so many.
  static constexpr bool kAhead = kHold != Hold::shared && !std::is_same<In, Mixed>::value;
  static constexpr int kDepth = kPlain && sizeof(In) == 4 ? 3 : 2;

  // A thread's chunks as they come.
  struct Raw {
    Vector16<In> student[kSlots], teacher[kSlots];
  };

  const SharedVectors<In> shared;  // [2, most] for Hold::shared
  const int most;                  // most_chunks
  Real mix = 1;                    // of the teacher in TAID's target
  Raw raw;
  Real z[kSlots][kSize], t[kSlots][kSize], z_e[kSlots][kSize], t_e[kSlots][kSize];

  __device__ HeldRow(const Problem<Real>& problem, const Pair& pair,
                     const SharedVectors<In>& shared)
      : Pair(pair), shared(shared), most(most_chunks<In>(pair.student.vocab)) {
    if (kTeacher && problem.kind == kTAID && problem.params.a > 0) mix = problem.params.a;
  }

  __device__ static void fetch_chunk(const Pair& pair, Raw& raw, int slot, int chunk) {
    const int start = pair.origin + chunk * kSize;
    raw.student[slot] = pair.student.fetch(start);
    if constexpr (kTeacher) raw.teacher[slot] = pair.teacher.fetch(start);
  }
  // All that a thread holds of a row, for Hold::registers.
  __device__ static Raw fetch_row(const Pair& pair) {
    Raw raw;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      fetch_chunk(pair, raw, slot, T::rank() + slot * kThreads);
    return raw;
  }

  // f(slot, first column) for the chunks of this thread.
  template <class F>
  __device__ __forceinline__ void each_chunk(F f) {
    if constexpr (kRegisters) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        f(slot, origin + (T::rank() + slot * kThreads) * kSize);
    } else if constexpr (kAhead) {
      Raw ahead[kDepth];
      const auto fetch = [&](int i, int k) {
        if (k < chunks) fetch_chunk(*this, ahead[i], 0, k);
      };
#pragma unroll
      for (int i = 0; i < kDepth; ++i) fetch(i, T::rank() + i * kThreads);
      // Unrolled, so that no load is waited for to be moved to another register.
#pragma unroll 1
      for (int k = T::rank(); k < chunks; k += kDepth * kThreads) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
          const int chunk = k + i * kThreads;
          if (chunk >= chunks) break;
          raw = ahead[i];
          fetch(i, chunk + kDepth * kThreads);
          f(0, origin + chunk * kSize);
        }
      }
    } else {
      for (int k = T::rank(); k < chunks; k += kThreads) f(0, origin + k * kSize);
    }
  }

  // f(chunk) for the places of this thread in shared memory, group by group, before(group) and
  // after(group).
  template <class Before, class F, class After>
  __device__ __forceinline__ void each_group(Before before, F f, After after) const {
    const int rounds = (most + kThreads - 1) / kThreads,
              in_group = (rounds + kGroups - 1) / kGroups;
    int k = T::rank();
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      before(group);
      const int end = k + in_group * kThreads;
#pragma unroll 1
      for (; k < end; k += kThreads)
        if (k < most) f(k);
      after(group);
    }
  }
  __device__ static void wait_for(int group) {
    switch (group) {
      case 0:
        return copy_async_wait<kGroups - 1>();
      case 1:
        return copy_async_wait<kGroups - 2>();
      case 2:
        return copy_async_wait<kGroups - 3>();
      default:
        return copy_async_wait<0>();
    }
  }

  // The place of a side's chunk in shared memory.
  __device__ int place(int side, int chunk) const { return side * most + chunk; }
  __device__ int chunk_of(int start) const { return (start - origin) / kSize; }

  // A chunk of a row pair to shared memory. A thread copies what itself will read: no barrier.
  __device__ void copy_chunk(const Pair& pair, int chunk) const {
    if (chunk >= pair.chunks) return;
    const int start = pair.origin + chunk * kSize;
    pair.student.copy(start, shared, place(0, chunk));
    if constexpr (kTeacher) pair.teacher.copy(start, shared, place(1, chunk));
  }
  __device__ void copy_to_shared() const {
    each_group([](int) {}, [&](int chunk) { copy_chunk(*this, chunk); },
               [](int) { copy_async_commit(); });
  }

  __device__ void load(int slot, int start) {
    if constexpr (kHold == Hold::shared) {
      const int chunk = chunk_of(start);
      student.widen(shared.load(place(0, chunk)), z[slot]);
      if constexpr (kTeacher) teacher.widen(shared.load(place(1, chunk)), t[slot]);
    } else if constexpr (kAhead) {
      student.widen(raw.student[slot], z[slot]);
      if constexpr (kTeacher) teacher.widen(raw.teacher[slot], t[slot]);
    } else {
      student.load(start, z[slot]);
      if constexpr (kTeacher) teacher.load(start, t[slot]);
    }
    if constexpr (kTeacher && !kPlain) {
      if (mix == 1) return;
      const Real a = mix * teacher.gain, b = (1 - mix) * student.gain;
#pragma unroll
      for (int i = 0; i < kSize; ++i) t[slot][i] = mul_add(a, t[slot][i], b * z[slot][i]);
    }
  }

  // Numbers of a chunk, in float32, in the place of its teacher's logits or, where these have 16 bits, of
  // both sides'.
  static constexpr bool kKeepsStudent = sizeof(In) >= sizeof(Real);
  __device__ void leave(int start, const Real (&x)[kSize]) const {
    const int chunk = chunk_of(start);
#pragma unroll
    for (int part = kKeepsStudent ? 1 : 0; part < 2; ++part) {
      Vector16<Real> v{};
#pragma unroll
      for (int i = 0; i < v.kSize; ++i) v.set(i, x[(kKeepsStudent ? 0 : part * v.kSize) + i]);
      shared.store(place(part, chunk), v.template as<In>());
    }
  }
  // They.
  __device__ void find_left(int start, Real (&x)[kSize]) const {
    const int chunk = chunk_of(start);
#pragma unroll
    for (int part = kKeepsStudent ? 1 : 0; part < 2; ++part) {
      const auto v = shared.load(place(part, chunk)).template as<Real>();
#pragma unroll
      for (int i = 0; i < v.kSize; ++i) x[(kKeepsStudent ? 0 : part * v.kSize) + i] = v.get(i);
    }
  }

  __device__ Real teacher_gain() const {
    return !kTeacher || (!kPlain && mix < 1) ? Real(1) : teacher.gain;
  }
};

}  // namespace stillhouse
