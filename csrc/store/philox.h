// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011): four random words as a pure function of a counter and a key.

#pragma once

#include <array>
#include <cstdint>

namespace contrastive_ops {

using Counter = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

// What each use of a seed puts in its counter's last word, so that no two uses share numbers.
// 2 is that of the permutation that deals instances out to shards (classifier/shards.py).
constexpr uint32_t kInitialRows = 0, kInitialActive = 1;

inline uint32_t low(uint64_t x) {
  return static_cast<uint32_t>(x);
}
inline uint32_t high(uint64_t x) {
  return static_cast<uint32_t>(x >> 32);
}

inline Counter philox(Counter c, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53} * c[0], odd = uint64_t{0xCD9E8D57} * c[2];
    c = {high(odd) ^ c[1] ^ key[0], low(odd), high(even) ^ c[3] ^ key[1], low(even)};
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return c;
}

}  // namespace contrastive_ops
