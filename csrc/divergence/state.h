// What a part of a row's columns says of the whole: parts merge into the state of all of them.
#pragma once
#include "math.h"

namespace stillhouse {

constexpr int kStateNumbers = 6;

// Relative to the maxima m of a part's tempered logits, -inf for a part without any:
//   z_sum = sum e^(z - m_z),  z_cross = sum e^(z - m_z) ((z - m_z) - (t - m_t)),  and for t the other way.
// Differences are summed as they are: sums of z and of t would cancel.
struct RowState {
  double z_max = -INFINITY, z_sum = 0, t_max = -INFINITY, t_sum = 0, z_cross = 0, t_cross = 0;

  SH_INLINE static double scaled(double factor, double x) {
    return factor > 0 ? factor * x : factor;
  }

  // The same relative to other maxima, which are not smaller.
  SH_INLINE void move_to(double z, double t) {
    const double dz = z_max > -INFINITY ? z_max - z : 0, dt = t_max > -INFINITY ? t_max - t : 0;
    const double ez = z_max > -INFINITY ? ::exp(dz) : 0, et = t_max > -INFINITY ? ::exp(dt) : 0;
    z_cross = scaled(ez, z_cross + z_sum * (dz - dt));
    t_cross = scaled(et, t_cross + t_sum * (dt - dz));
    z_sum = scaled(ez, z_sum), t_sum = scaled(et, t_sum);
    z_max = z, t_max = t;
  }
};

}  // namespace stillhouse
