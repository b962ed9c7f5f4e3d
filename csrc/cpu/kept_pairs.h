// Similarities of all pairs, kept from one pass over keys for another.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "matrix.h"
#include "spare_memory.h"

namespace contrastive_ops {

// A matrix of all pairs (panels, keys, lanes) in memory that another owns; or none, and they are computed
// again.
template <typename T>
class KeptPairs {
 public:
  KeptPairs() = default;
  KeptPairs(void* memory, int64_t keys) : memory_(static_cast<T*>(memory)), keys_(keys) {}

  static int64_t bytes(int64_t panels, int64_t keys) {
    return panels * keys * kPanel<T> * static_cast<int64_t>(sizeof(T));
  }

  explicit operator bool() const { return memory_ != nullptr; }

  // Those of a panel with this key and those after it.
  T* at(int64_t panel, int64_t key) const { return memory_ + (panel * keys_ + key) * kPanel<T>; }

 private:
  T* memory_ = nullptr;
  int64_t keys_ = 0;
};

// What a forward leaves to its backward behind a tensor that goes from the one to the other anyway, in the
// same memory: it lives as long, belongs to no other, and who copies the tensor has a tensor without it. The
// tensors it was made of tell whether it is of use: by where they lie and how often they were written to.
class Appendix {
 public:
  explicit Appendix(std::initializer_list<at::Tensor> made_of) {
    auto* word = source_.begin();
    *word++ = 0x636f6e7472617374;  // no memory holds this by chance, and the rest
    for (const auto& tensor : made_of) {
      usable_ &= !tensor.is_inference();  // of which nobody knows whether it was written to
      *word++ = reinterpret_cast<int64_t>(tensor.const_data_ptr());
      *word++ = tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
    }
  }

  // A tensor of records, and so many bytes behind it; none where none are asked for or they would be of no
  // use.
  template <typename Record>
  std::pair<at::Tensor, void*> append(const std::vector<int64_t>& shape, int64_t bytes) const {
    at::Tensor records = std::get<0>(empty_records<Record>(shape));
    if (!usable_ || bytes == 0) return {records, nullptr};
    const int64_t begin = beginning(records);
    const at::Storage memory = spare_storage(begin + bytes);
    auto* data = static_cast<uint8_t*>(memory.mutable_data());
    std::memcpy(data + begin - sizeof(source_), source_.data(), sizeof(source_));
    const auto sizes = records.sizes().vec(), strides = records.strides().vec();
    records.set_(memory, 0, sizes, strides);
    return {records, data + begin};
  }

  // The bytes behind records, or none.
  void* of(const at::Tensor& records, int64_t bytes) const {
    if (!usable_ || bytes == 0 || records.storage_offset() != 0 || !records.is_contiguous()) return nullptr;
    const int64_t begin = beginning(records);
    if (static_cast<int64_t>(records.storage().nbytes()) != begin + bytes) return nullptr;
    auto* data = static_cast<uint8_t*>(const_cast<void*>(records.storage().data()));
    const bool same = std::memcmp(data + begin - sizeof(source_), source_.data(), sizeof(source_)) == 0;
    return same ? data + begin : nullptr;
  }

 private:
  int64_t beginning(const at::Tensor& records) const {
    static_assert(sizeof(source_) <= kLineBytes);
    return whole_lines(static_cast<int64_t>(records.nbytes())) + kLineBytes;
  }

  std::array<int64_t, 5> source_{};
  bool usable_ = true;
};

}  // namespace contrastive_ops
