// The exchange of the classifier's active rows for others, which are caught up.
// contrastive_ops/gpu/exchange.py is the host's side.
//
// A block of threads sends a row out and takes another in, for BLOCK of its dimensions. Bound by memory: four
// numbers are read and four written for each element of a row. Records may lie in the host's memory, across
// the bus. It has not been measured on a GPU yet.
#pragma once

#include "elements.h"

namespace contrastive_ops {

// Half of the records [w; v] of some rows, as a matrix: that of the weight, 0, or of the momentum, 1.
template <typename T, class Records>
__device__ Matrix<T> half_of(const Records& records, int which) {
  return {records.data + which * records.half, records.row, records.column};
}

// An element of a matrix, or NaN.
template <typename T>
__device__ T read(const Matrix<T>& matrix, bool is_there, int64 row, int64 column) {
  return is_there ? matrix.at(row, column) : from_float<T>(__int_as_float(0x7fffffff));
}

// Arguments: weight, momentum_buffer: Matrix (active, D). incoming: records (coming, 2, D), with strides row,
// half and column. outgoing: records (going, 2, D). slots, incoming_rows, outgoing_rows: (n,). coefficients:
// (n, 2, 2). Rows outside are read as NaN and not written.
template <typename Arguments>
__device__ void exchange(const Arguments& a) {
  const int64 i = blockIdx.x;
  const int64 slot = a.slots[i], row = a.incoming_rows[i], out_row = a.outgoing_rows[i];
  const bool here = slot >= 0 && slot < a.active;
  const bool comes = row >= 0 && row < a.coming, goes = out_row >= 0 && out_row < a.going;
  const double* const c = a.coefficients + 4 * i;
  const double c_ww = c[0], c_wv = c[1], c_vw = c[2], c_vv = c[3];

  using T = decltype(read(a.weight, here, 0, 0));
  const auto come_w = half_of<T>(a.incoming, 0), come_v = half_of<T>(a.incoming, 1);
  const auto go_w = half_of<T>(a.outgoing, 0), go_v = half_of<T>(a.outgoing, 1);
  const int64 begin = blockIdx.y * static_cast<int64>(Arguments::BLOCK);
  const int64 end = begin + Arguments::BLOCK < a.dim ? begin + Arguments::BLOCK : a.dim;
  for (int64 column = begin + threadIdx.x; column < end; column += blockDim.x) {
    const double w = convert<double>(read(come_w, comes, row, column));
    const double v = convert<double>(read(come_v, comes, row, column));
    const T old_w = read(a.weight, here, slot, column), old_v = read(a.momentum_buffer, here, slot, column);
    if (goes) go_w.at(out_row, column) = old_w, go_v.at(out_row, column) = old_v;
    if (here) {  // [w; v] <- C [w; v]
      a.weight.at(slot, column) = convert<T>(c_ww * w + c_wv * v);
      a.momentum_buffer.at(slot, column) = convert<T>(c_vw * w + c_vv * v);
    }
  }
}

}  // namespace contrastive_ops
