// The value that a row has before it is first written: a random direction that needs no storage.

#pragma once

#include <cmath>
#include <numbers>
#include <vector>

#include "philox.h"

namespace contrastive_ops {

// out[i] (dim numbers, `stride` apart) = z / |z| with z standard normal by Box and Muller, z a pure function
// of seed, instance and dimension.
template <typename T>
void initial_rows(uint64_t seed, const int64_t* instances, int64_t count, int64_t dim, T* out,
                  int64_t stride) {
  const int64_t blocks = (dim + 3) / 4;
  std::vector<double> z(4 * blocks);
  for (int64_t row = 0; row < count; ++row, out += stride) {
    const auto instance = static_cast<uint64_t>(instances[row]);
    for (int64_t block = 0; block < blocks; ++block) {
      const Counter words =
          philox({low(block), low(instance), high(instance), kInitialRows}, {low(seed), high(seed)});
      for (int pair = 0; pair < 4; pair += 2) {
        // The half keeps u from 0 and 1 and the angle from the axes: no z is infinite, and none is zero.
        const double u = (words[pair] + 0.5) * 0x1p-32;
        const double angle = (words[pair + 1] + 0.5) * (2 * std::numbers::pi * 0x1p-32);
        const double radius = std::sqrt(-2 * std::log(u));
        z[4 * block + pair] = radius * std::cos(angle);
        z[4 * block + pair + 1] = radius * std::sin(angle);
      }
    }
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) square += z[d] * z[d];
    const double scale = 1 / std::sqrt(square);
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<T>(z[d] * scale);
  }
}

}  // namespace contrastive_ops
