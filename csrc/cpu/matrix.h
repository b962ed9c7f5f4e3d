// Matrices and records as they lie in memory; matrices copied, and their rows normalised.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace contrastive_ops {

inline constexpr double kNormEpsilon = 1e-12;  // a row shorter than this is divided by this

// A tensor to be written. Without the dispatcher it takes a third of a microsecond less, and a small loss is
// done in fifty.
inline at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::Tensor(at::detail::empty_cpu(shape, dtype));
}

inline constexpr int64_t kLineBytes = 64;  // of a line of the cache

// As many bytes, and those that fill the last line.
inline int64_t whole_lines(int64_t bytes) {
  return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// Memory that begins with a line of the cache: a vector that lies across two of them takes twice as long to
// read, and memory from the heap has all of them lie so.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{kLineBytes};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <typename T>
using Array = std::vector<T, LineAllocator<T>>;

// A matrix in memory, of any floating dtype and strides.
struct Matrix {
  const void* data;
  at::ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const at::Tensor& matrix)
      : data(matrix.const_data_ptr()),
        dtype(matrix.scalar_type()),
        rows(matrix.size(0)),
        columns(matrix.size(1)),
        row_stride(matrix.stride(0)),
        column_stride(matrix.stride(1)) {}

  template <typename T>
  Matrix(const T* data, int64_t rows, int64_t columns)
      : data(data),
        dtype(c10::CppTypeToScalarType<T>::value),
        rows(rows),
        columns(columns),
        row_stride(columns),
        column_stride(1) {}

  Matrix slice(int64_t begin, int64_t end) const {
    Matrix part = *this;
    part.data =
        static_cast<const char*>(data) + begin * row_stride * static_cast<int64_t>(c10::elementSize(dtype));
    part.rows = end - begin;
    return part;
  }
};

// A tensor whose last dimension is the fields of a record, read.
template <typename Record>
class Records {
 public:
  static constexpr int64_t kFields = sizeof(Record) / sizeof(double);

  explicit Records(const at::Tensor& tensor)
      : tensor_((tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kDouble)).contiguous()),
        data_(reinterpret_cast<const Record*>(tensor_.const_data_ptr<double>())) {
    TORCH_CHECK_VALUE(tensor.size(-1) == kFields, "expected a last dimension of ", kFields, " fields (",
                      Record::kFields, "), got ", tensor.size(-1));
  }

  const Record& operator[](int64_t index) const { return data_[index]; }

 private:
  const at::Tensor tensor_;
  const Record* data_;
};

// A tensor for records of this shape, and where they are to be written.
template <typename Record>
std::tuple<at::Tensor, Record*> empty_records(std::vector<int64_t> shape) {
  shape.push_back(Records<Record>::kFields);
  at::Tensor tensor = empty(shape, at::kDouble);
  return {tensor, reinterpret_cast<Record*>(tensor.mutable_data_ptr<double>())};
}

// A vector in memory, to be written.
template <typename T>
struct Strided {
  T* data;
  int64_t stride;

  T& operator[](int64_t i) const { return data[i * stride]; }
};

template <typename Function>
void with_dtype(at::ScalarType dtype, Function&& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float{});
    case at::kDouble:
      return function(double{});
    case at::kBFloat16:
      return function(at::BFloat16{});
    case at::kHalf:
      return function(at::Half{});
    default:
      TORCH_CHECK_TYPE(false, "expected a floating dtype, got ", dtype);
  }
}

// Copies numbers to another dtype; to their own as bytes, for which at::vec::convert has no path.
template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>)
    std::copy_n(from, count, to);
  else
    at::vec::convert(from, to, count);
}

// Copies a matrix into the layout given by the strides of `out`, walking along whichever side is contiguous.
template <typename T>
void copy(const Matrix& from, T* out, int64_t row_stride, int64_t column_stride) {
  with_dtype(from.dtype, [&](auto element) {
    using source_t = decltype(element);
    const auto* in = static_cast<const source_t*>(from.data);
    if (from.column_stride == 1 && column_stride == 1) {
      for (int64_t i = 0; i < from.rows; ++i)
        convert(in + i * from.row_stride, out + i * row_stride, from.columns);
    } else if (from.row_stride == 1 && row_stride == 1) {
      for (int64_t d = 0; d < from.columns; ++d)
        convert(in + d * from.column_stride, out + d * column_stride, from.rows);
    } else {
      for (int64_t i = 0; i < from.rows; ++i)
        for (int64_t d = 0; d < from.columns; ++d)
          out[i * row_stride + d * column_stride] =
              static_cast<T>(in[i * from.row_stride + d * from.column_stride]);
    }
  });
}

// Writes a row of a contiguous tensor, of any floating dtype.
template <typename T>
void write_row(const at::Tensor& out, int64_t row, const T* values) {
  with_dtype(out.scalar_type(), [&](auto element) {
    using to_t = decltype(element);
    const int64_t dim = out.size(-1);
    to_t* to = out.mutable_data_ptr<to_t>() + row * dim;
    convert(values, to, dim);
  });
}

// The sum of products in double: those of floats are exact there, and none overflows.
template <typename A, typename B>
double dot(const A* a, const B* b, int64_t count) {
  constexpr int64_t kW = kWidth<double>, kChains = 4;  // as many as hide how long a sum takes
  Vec<double> sum[kChains];
  for (auto& chain : sum) chain = Vec<double>(0.);
  int64_t i = 0;
  for (; i + kChains * kW <= count; i += kChains * kW)
#pragma GCC unroll 4
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kW;
      sum[chain] = at::vec::fmadd(load_doubles(a + at), load_doubles(b + at), sum[chain]);
    }
  double rest = 0;
  for (; i < count; ++i) rest += static_cast<double>(a[i]) * b[i];
  double lanes[kW];
  ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(lanes);
  for (int64_t half = kW / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0] + rest;
}

// |x|
template <typename T>
double norm_of(const T* x, int64_t dim) {
  if constexpr (std::is_same_v<T, double>) {
    double largest = 0;
    for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(x[d]));
    if (largest > 1e150) {  // its square might overflow
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += (x[d] / largest) * (x[d] / largest);
      return largest * std::sqrt(sum);
    }
  }
  return std::sqrt(dot(x, x, dim));
}

// x <- x / max(|x|, epsilon)
template <typename T>
void divide_by_norm(T* x, double norm, int64_t dim) {
  const double inverse = 1 / std::max(norm, kNormEpsilon);
  for (int64_t d = 0; d < dim; ++d) x[d] = static_cast<T>(x[d] * inverse);
}

// The same; returns |x|.
template <typename T>
double normalize(T* x, int64_t dim) {
  const double norm = norm_of(x, dim);
  divide_by_norm(x, norm, dim);
  return norm;
}

// dx = (dx^ - x^ (x^.dx^)) / |x|, in place, with dx^ = grad / scale; a row below the epsilon was only scaled,
// so it has no projection.
template <typename Grad, typename T>
void differentiate_norm(Grad* grad, const T* unit, double norm, int64_t dim, double scale = 1) {
  const double radial = norm < kNormEpsilon ? 0 : dot(grad, unit, dim);
  const Grad along = static_cast<Grad>(radial),
             inverse = static_cast<Grad>(1 / std::max(norm, kNormEpsilon) / scale);
  for (int64_t d = 0; d < dim; ++d) grad[d] = (grad[d] - unit[d] * along) * inverse;
}

// Multiplies each column of a matrix (rows x panel) by its factor, in place.
template <typename T>
void scale_lanes(T* matrix, int64_t rows, const T* factors) {
  if (std::all_of(factors, factors + kPanel<T>, [](T factor) { return factor == 1; })) return;
  for (int64_t i = 0; i < rows * kPanel<T>; i += kWidth<T>)
    (Vec<T>::loadu(matrix + i) * Vec<T>::loadu(factors + i % kPanel<T>)).store(matrix + i);
}

}  // namespace contrastive_ops
