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

template <class Real, class In, int kThreads, Hold kHold, bool kPlain, bool kTeacher>
struct HeldRow {
  using T = Team<kThreads>;
  using Side = DeviceSide<In, Real, kPlain>;
  static constexpr int kSize = kChunk<In>;
  static constexpr bool kRegisters = kHold == Hold::registers;
  static constexpr int kSlots = kRegisters ? kHeld / kSize : 1;  // chunks a thread holds

  const SharedPointer<In> shared;  // [2, chunks, kSize] for Hold::shared
  Side student, teacher;
  Real mix = 1;  // of the teacher in TAID's target
  int64_t origin = 0, chunks = 0;
  Real z[kSlots][kSize], t[kSlots][kSize], z_e[kSlots][kSize], t_e[kSlots][kSize];

  __device__ HeldRow(const Problem<Real>& problem, int64_t r, SharedPointer<In> shared)
      : shared(shared), student(problem.student, r, problem.vocab) {
    const int head = student.head();
    origin = head > 0 ? head - kSize : 0;
    chunks = (problem.vocab - origin + kSize - 1) / kSize;
    student.aligned = Side::on_16_bytes(student.row, origin);
    if constexpr (kTeacher) {
      const bool is_student = problem.kind == kTAID && problem.params.a == 0;
      teacher = Side(is_student ? problem.student : problem.teacher, r, problem.vocab);
      if (problem.kind == kTAID && problem.params.a > 0) mix = problem.params.a;
      teacher.aligned = Side::on_16_bytes(teacher.row, origin);
    }
  }

  // f(slot, first column) for the chunks of this thread.
  template <class F>
  __device__ __forceinline__ void each_chunk(F f) {
    if constexpr (kRegisters) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        f(slot, origin + (T::rank() + slot * kThreads) * kSize);
    } else {
      for (int64_t k = T::rank(); k < chunks; k += kThreads) f(0, origin + k * kSize);
    }
  }

  // Where a chunk of a side lies in shared memory.
  __device__ SharedPointer<In> held(int side, int64_t start) const {
    return shared + (side * chunks * kSize + start - origin);
  }

  // The row pair to shared memory. Every thread copies what it will read: no barrier.
  __device__ void copy_to_shared() {
    each_chunk([&](int, int64_t start) {
      student.copy(start, held(0, start));
      teacher.copy(start, held(1, start));
    });
    copy_async_commit();
    copy_async_wait<0>();
  }

  __device__ void load(int slot, int64_t start) {
    if constexpr (kHold == Hold::shared) {
      Side::widen_all(load_vector(held(0, start)), z[slot]);
      Side::widen_all(load_vector(held(1, start)), t[slot]);
      return;
    }
    student.load(start, z[slot]);
    if constexpr (kTeacher) {
      teacher.load(start, t[slot]);
      if (!kPlain && mix < 1) {
        const Real a = mix * teacher.gain, b = (1 - mix) * student.gain;
#pragma unroll
        for (int i = 0; i < kSize; ++i) t[slot][i] = mul_add(a, t[slot][i], b * z[slot][i]);
      }
    }
  }
  __device__ Real teacher_gain() const {
    return !kTeacher || (!kPlain && mix < 1) ? Real(1) : teacher.gain;
  }
};

}  // namespace stillhouse
