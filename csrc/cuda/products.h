// Products of the tiles in shared memory, a warp at a time, or four: s = X Nᵀ of 16 rows and the keys of a
// tile, and grad += g N. An engine for each kind of unit; all give a thread the same share of a product.
//
//   compute capability   float16             bfloat16               TF32               float32, exactly
//   9.0 (warpgroups.h)   wgmma m64n*k16      wgmma m64n*k16         as 8.0             as 8.0
//   8.0 and newer        mma m16n8k16        mma m16n8k16           mma m16n8k8        three products in TF32
//   7.5                  mma m16n8k8         as float32             –                  multiply-adds
//   7.0, 7.2             mma m8n8k4          as float32             –                  multiply-adds
//
// Tensor cores before 8.0 have no bfloat16. Its rows are multiplied as float32 there, which loses nothing.
// (In float16 the units would be eight times as fast, but it does not hold the range of rows as they are
// stored.)
#pragma once

#include "copies.h"

namespace contrastive_ops {

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) & 31;
}
__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) >> 5;
}

#if __CUDA_ARCH__ >= 750
constexpr bool kHasQuadPairs = false;
#else
constexpr bool kHasQuadPairs = true;  // Volta's: 8 threads multiply, not a warp
#endif

// A thread's share of a product of 16 rows: it has two rows, whose numbers lie at n = 0, 1 and at n = 2, 3 of
// every four, and 4 threads share a row. Where its numbers are:
template <bool kQuadPairs>
struct Share {
  __device__ static int row(int slot) { return (lane_index() >> 2) + 8 * slot; }
  __device__ static int column(int n) { return 8 * (n >> 2) + 2 * (lane_index() & 3) + (n & 1); }
  // A bit of a lane's number that tells lanes apart which share their rows; there are two.
  __device__ static constexpr int mask(int i) { return 1 << i; }
  __device__ static bool is_first() { return (lane_index() & 3) == 0; }
};

// mma.m8n8k4 multiplies four times 8 x 8 in a warp, here as 2 x 2 blocks of 16 x 16. A quad pair is four
// lanes and the four 16 further on.
template <>
struct Share<true> {
  __device__ static int pair_row() { return (lane_index() >> 2) & 1; }
  __device__ static int pair_column() { return (lane_index() >> 3) & 1; }
  __device__ static int row(int slot) {
    return 8 * pair_row() + 4 * (lane_index() >> 4) + (lane_index() & 1) + 2 * slot;
  }
  __device__ static int column(int n) {
    return 16 * (n >> 3) + 8 * pair_column() + (n & 4) + (lane_index() & 2) + (n & 1);
  }
  __device__ static constexpr int mask(int i) { return i == 0 ? 2 : 8; }
  __device__ static bool is_first() { return (lane_index() & 10) == 0; }
};

// The numbers of a row among a thread's share, in their order.
__device__ constexpr int number_of(int slot, int i) {
  return 4 * (i >> 1) + 2 * slot + (i & 1);
}

// 16 rows of 32 bytes, or 8 keys of them, a register for 4 bytes of a row.
struct RowFragment {
  unsigned x[4];  // rows 0-7 and 8-15 of the first 16 bytes, then of the second
};

__device__ inline void load_matrices(unsigned (&x)[4], const void* from) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(from))
               : "memory");
#endif
}
__device__ inline void load_matrices_transposed(unsigned (&x)[4], const void* from) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(from))
               : "memory");
#endif
}

// c += a b of 16 rows, 8 columns and 32 bytes of depth.
template <typename Operand>
__device__ void multiply(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply<Half>(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ inline void multiply<BFloat16>(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ inline void multiply<float>(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Bits of a float as TF32. Tensor cores cut off the lower 13 bits; before, what these are is rounded.
__device__ inline unsigned to_tf32(unsigned bits) {
  const float x = __uint_as_float(bits);
  return x == x ? bits + 0x1000 : bits;
}

// A float as the sum of two of TF32, all but its last two bits. The lower part of a NaN is one.
struct TwoParts {
  unsigned high, low;
};
__device__ inline TwoParts two_parts(unsigned bits) {
  const unsigned high = (bits + 0x1000) & 0xffffe000;
  return {high, __float_as_uint(__uint_as_float(bits) - __uint_as_float(high))};
}

// ---- Engines ----
//
//   kFromRegisters            whether rows may be held in registers
//   kIsAsync                  whether products go on after a function has returned; until `land` does, nobody
//                             may touch what they write
//   Layout<kRows>             how rows of kRowBytes lie in shared memory
//   load_rows<kRows>(block, step)  a fragment of a warp's 16 rows of a block
//   rows_at<kRows>(block, step)    the same, or what stands for it, of rows that are not held in registers
//   similarities<kSteps>(s, fragment, keys, adds)  s[block] = X_block Nᵀ, or what it is added to, of kSteps
//   times
//                             32 bytes of depth; fragment(block, step) gives the rows
//   accumulate(grad, g, keys, scratch)  grad[block] += g[block] N of the blocks that have a gradient; where
//                             products are asynchronous, of rows from pack_rows<kGradients>(g), and no
//                             scratch
//   land<kLeft>(x)            waits for all products but those of the last kLeft calls; x is what others
//   write

// What engines have in common whose products are done when a function returns.
template <typename Product, int kRowBytes>
class SynchronousProduct {
 public:
  static constexpr bool kIsAsync = false;
  template <int kRows>
  using Layout = Padded<kRows, kRowBytes>;

  template <int kRows>
  __device__ static auto rows_at(const unsigned char* block, int step) {
    return Product::template load_rows<kRows>(block, step);
  }
  template <int kLeft>
  __device__ static void land() {}
  template <int kLeft, int kBlocks, int kNumbers>
  __device__ static void land(float (&)[kBlocks][kNumbers]) {}

 protected:
  static constexpr int kStride = Padded<1, kRowBytes>::kStride;  // bytes from row to row

  __device__ static const unsigned char* own_rows(const unsigned char* block) {
    return block + 16 * warp_index() * kStride;
  }
  template <int kBlocks, int kNumbers>
  __device__ static void clear(float (&s)[kBlocks][kNumbers]) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) s[block][i] = 0;
  }
};

// Tensor cores from compute capability 7.5 on.
template <typename Operand, Precision kPrecision, int kRowBytes>
class WarpProduct : public SynchronousProduct<WarpProduct<Operand, kPrecision, kRowBytes>, kRowBytes> {
  using Base = SynchronousProduct<WarpProduct, kRowBytes>;
  using Base::kStride;

  static constexpr bool kIsHalf = sizeof(Operand) == 2;
  static constexpr bool kIsExact = kPrecision == Precision::tf32x3;

 public:
  static constexpr bool kFromRegisters = true;
  static constexpr int kScratchBytes = 0;
  using Places = Share<false>;
#if __CUDA_ARCH__ < 800
  static_assert(!IsSame<Operand, BFloat16>::value, "its rows are multiplied as float32");
#endif

  template <int kRows>
  __device__ static RowFragment load_rows(const unsigned char* block, int step) {
    const int lane = lane_index();
    RowFragment fragment;
    load_matrices(fragment.x, Base::own_rows(block) + (lane & 15) * kStride + 32 * step + 16 * (lane >> 4));
    if constexpr (kPrecision == Precision::tf32) {
#pragma unroll
      for (unsigned& x : fragment.x) x = to_tf32(x);
    }
    return fragment;
  }

  template <int kSteps, bool kAdds, int kBlocks, int kNumbers, typename Fragment>
  __device__ static void similarities(float (&s)[kBlocks][kNumbers], const Fragment& fragment,
                                      const unsigned char* keys) {
    if constexpr (!kAdds) Base::clear(s);
    const int lane = lane_index();
    const unsigned char* from = keys + ((lane & 7) + 8 * (lane >> 4)) * kStride + 16 * ((lane >> 3) & 1);
    constexpr int kTiles = kNumbers / 4;  // of 8 keys
    if constexpr (!kIsExact) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        RowFragment rows[kBlocks];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) rows[block] = fragment(block, step);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          unsigned b[4];
          load_matrices(b, from + 8 * tile * kStride + 32 * step);
          if constexpr (!kIsHalf) {
#pragma unroll
            for (unsigned& x : b) x = to_tf32(x);
          }
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            multiply<Operand>(&s[block][4 * tile], rows[block].x, b[0], b[1]);
            multiply<Operand>(&s[block][4 * tile + 4], rows[block].x, b[2], b[3]);
          }
        }
      }
    } else {
      // Tensor cores cut off what their sum cannot hold, so a long sum shrinks. So 16 numbers of depth are
      // summed there, from 0, and the sums added up by additions that round.
      static_assert(kSteps % 2 == 0);
#pragma unroll
      for (int first = 0; first < kSteps; first += 2) {
        RowFragment high[kBlocks][2], low[kBlocks][2];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int step = 0; step < 2; ++step)
            split_fragment(fragment(block, first + step).x, high[block][step].x, low[block][step].x);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          float sum[kBlocks][8] = {};
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            unsigned b[4], b_high[4], b_low[4];
            load_matrices(b, from + 8 * tile * kStride + 32 * (first + step));
            split_fragment(b, b_high, b_low);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float* c = &sum[block][4 * half];
                multiply<float>(c, low[block][step].x, b_high[2 * half], b_high[2 * half + 1]);
                multiply<float>(c, high[block][step].x, b_low[2 * half], b_low[2 * half + 1]);
                multiply<float>(c, high[block][step].x, b_high[2 * half], b_high[2 * half + 1]);
              }
          }
#pragma unroll
          for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 8; ++i) s[block][4 * tile + i] += sum[block][i];
        }
      }
    }
  }

  template <int kGradients, int kColumns, int kBlocks, int kNumbers>
  __device__ static void accumulate(float (&grad)[kGradients][kColumns], const float (&g)[kBlocks][kNumbers],
                                    const unsigned char* keys, unsigned char*) {
    if constexpr (kIsHalf)
      accumulate_half(grad, g, keys);
    else
      accumulate_float(grad, g, keys);
  }

 private:
  __device__ static void split_fragment(const unsigned (&x)[4], unsigned (&high)[4], unsigned (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const TwoParts parts = two_parts(x[i]);
      high[i] = parts.high, low[i] = parts.low;
    }
  }

  // A thread's share of s, of two tiles of 8 keys, is its share of 16 rows of g as they are multiplied.
  template <int kGradients, int kColumns, int kBlocks, int kNumbers>
  __device__ static void accumulate_half(float (&grad)[kGradients][kColumns],
                                         const float (&g)[kBlocks][kNumbers], const unsigned char* keys) {
    const int lane = lane_index();
    const unsigned char* from = keys + (lane & 15) * kStride + 16 * (lane >> 4);
#pragma unroll
    for (int tile = 0; tile < kNumbers / 8; ++tile) {  // of 16 keys
      unsigned a[kGradients][4];
#pragma unroll
      for (int block = 0; block < kGradients; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[block][i] = pack<Operand>(g[block][8 * tile + 2 * i], g[block][8 * tile + 2 * i + 1]);
#pragma unroll
      for (int columns = 0; columns < kColumns / 8; ++columns) {  // of 16 dimensions
        unsigned b[4];
        load_matrices_transposed(b, from + 16 * tile * kStride + 32 * columns);
#pragma unroll
        for (int block = 0; block < kGradients; ++block) {
          multiply<Operand>(&grad[block][8 * columns], a[block], b[0], b[1]);
          multiply<Operand>(&grad[block][8 * columns + 4], a[block], b[2], b[3]);
        }
      }
    }
  }

  // Here a thread has the keys 2 t and 2 t + 1 of eight, where the units expect t and t + 4. The order of
  // keys is no matter: N is loaded in the same.
  template <int kGradients, int kColumns, int kBlocks, int kNumbers>
  __device__ static void accumulate_float(float (&grad)[kGradients][kColumns],
                                          const float (&g)[kBlocks][kNumbers], const unsigned char* keys) {
    const int lane = lane_index();
    const unsigned char* from = keys + 2 * (lane & 3) * kStride + 4 * (lane >> 2);
    constexpr int kTiles = kNumbers / 4;
    unsigned a[kGradients][kTiles][4];
#pragma unroll
    for (int block = 0; block < kGradients; ++block)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned bits = __float_as_uint(g[block][4 * tile + 2 * (i & 1) + (i >> 1)]);
          a[block][tile][i] = kIsExact ? bits : to_tf32(bits);
        }
#pragma unroll
    for (int column = 0; column < kColumns / 4; ++column) {  // of 8 dimensions
      float sum[kGradients][4] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const unsigned char* place = from + 8 * tile * kStride + 32 * column;
        const unsigned b0 = *reinterpret_cast<const unsigned*>(place);
        const unsigned b1 = *reinterpret_cast<const unsigned*>(place + kStride);
        if constexpr (kIsExact) {
          const TwoParts first = two_parts(b0), second = two_parts(b1);
#pragma unroll
          for (int block = 0; block < kGradients; ++block) {
            unsigned high[4], low[4];
            split_fragment(a[block][tile], high, low);
            multiply<float>(sum[block], low, first.high, second.high);
            multiply<float>(sum[block], high, first.low, second.low);
            multiply<float>(sum[block], high, first.high, second.high);
          }
        } else {
#pragma unroll
          for (int block = 0; block < kGradients; ++block)
            multiply<float>(&grad[block][4 * column], a[block][tile], to_tf32(b0), to_tf32(b1));
        }
      }
      if constexpr (kIsExact) {
#pragma unroll
        for (int block = 0; block < kGradients; ++block)
#pragma unroll
          for (int i = 0; i < 4; ++i) grad[block][4 * column + i] += sum[block][i];
      }
    }
  }
};

// Float32 by multiply-adds, where there are no tensor cores for it. Rows are read from shared memory, 4
// numbers at a time, which lanes that need the same share.
template <int kRowBytes>
class ThreadProduct : public SynchronousProduct<ThreadProduct<kRowBytes>, kRowBytes> {
  using Base = SynchronousProduct<ThreadProduct, kRowBytes>;
  using Base::kStride;

 public:
  static constexpr bool kFromRegisters = false;
  static constexpr int kScratchBytes = 0;
  using Places = Share<false>;

  // Of 32 bytes of depth only the rows' place is known before.
  struct Place {
    const unsigned char* rows;
  };
  template <int kRows>
  __device__ static Place load_rows(const unsigned char* block, int step) {
    return {Base::own_rows(block) + 32 * step};
  }

  template <int kSteps, bool kAdds, int kBlocks, int kNumbers, typename Fragment>
  __device__ static void similarities(float (&s)[kBlocks][kNumbers], const Fragment& fragment,
                                      const unsigned char* keys) {
    if constexpr (!kAdds) Base::clear(s);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 32; half += 16) {
        float4 rows[kBlocks][2];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int slot = 0; slot < 2; ++slot)
            rows[block][slot] = at(fragment(block, step).rows + half, Places::row(slot));
#pragma unroll
        for (int i = 0; i < kNumbers / 2; ++i) {
          const float4 key = at(keys + 32 * step + half, Places::column(number_of(0, i)));
#pragma unroll
          for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
              float& sum = s[block][number_of(slot, i)];
              const float4& row = rows[block][slot];
              sum = fmaf(row.w, key.w, fmaf(row.z, key.z, fmaf(row.y, key.y, fmaf(row.x, key.x, sum))));
            }
        }
      }
    }
  }

  template <int kGradients, int kColumns, int kBlocks, int kNumbers>
  __device__ static void accumulate(float (&grad)[kGradients][kColumns], const float (&g)[kBlocks][kNumbers],
                                    const unsigned char* keys, unsigned char*) {
    const int lane = lane_index();
#pragma unroll
    for (int key = 0; key < kNumbers * 2; ++key) {
      const int owner = (lane & ~3) | ((key & 7) >> 1);
      float own[kGradients][2];
#pragma unroll
      for (int block = 0; block < kGradients; ++block)
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
          own[block][slot] = __shfl_sync(0xffffffff, g[block][4 * (key >> 3) + 2 * slot + (key & 1)], owner);
#pragma unroll
      for (int column = 0; column < kColumns / 4; ++column) {
        const float2 n =
            *reinterpret_cast<const float2*>(keys + key * kStride + 32 * column + 8 * (lane & 3));
#pragma unroll
        for (int block = 0; block < kGradients; ++block)
#pragma unroll
          for (int slot = 0; slot < 2; ++slot) {
            float* sum = &grad[block][4 * column + 2 * slot];
            sum[0] = fmaf(own[block][slot], n.x, sum[0]);
            sum[1] = fmaf(own[block][slot], n.y, sum[1]);
          }
      }
    }
  }

 private:
  __device__ static float4 at(const unsigned char* rows, int row) {
    return *reinterpret_cast<const float4*>(rows + row * kStride);
  }
};

// Volta's tensor cores: mma.m8n8k4 of four quad pairs, in which a thread has 4 numbers of a row.
template <int kRowBytes>
class QuadPairProduct : public SynchronousProduct<QuadPairProduct<kRowBytes>, kRowBytes> {
  using Base = SynchronousProduct<QuadPairProduct, kRowBytes>;
  using Base::kStride;

 public:
  static constexpr bool kFromRegisters = false;
  static constexpr int kScratchBytes = 16 * (2 * 32 + kChunk);  // of a warp: g of 16 rows and 32 keys
  using Places = Share<true>;

  struct Place {
    const unsigned char* rows;
  };
  template <int kRows>
  __device__ static Place load_rows(const unsigned char* block, int step) {
    return {Base::own_rows(block) + 32 * step};
  }

  template <int kSteps, bool kAdds, int kBlocks, int kNumbers, typename Fragment>
  __device__ static void similarities(float (&s)[kBlocks][kNumbers], const Fragment& fragment,
                                      const unsigned char* keys) {
    if constexpr (!kAdds) Base::clear(s);
    const int own = (lane_index() & 3) + 4 * (lane_index() >> 4);  // row of A, column of B in the quad pair
#pragma unroll
    for (int step = 0; step < 2 * kSteps; ++step) {
      uint4 rows[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
        rows[block] = *reinterpret_cast<const uint4*>(fragment(block, 0).rows + 16 * step +
                                                      (8 * Places::pair_row() + own) * kStride);
#pragma unroll
      for (int tile = 0; tile < kNumbers / 8; ++tile) {  // of 16 keys
        const uint4 key = *reinterpret_cast<const uint4*>(
            keys + 16 * step + (16 * tile + 8 * Places::pair_column() + own) * kStride);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          multiply_columns(&s[block][8 * tile], rows[block].x, rows[block].y, key.x, key.y);
          multiply_columns(&s[block][8 * tile], rows[block].z, rows[block].w, key.z, key.w);
        }
      }
    }
  }

  template <int kGradients, int kColumns, int kBlocks, int kNumbers>
  __device__ static void accumulate(float (&grad)[kGradients][kColumns], const float (&g)[kBlocks][kNumbers],
                                    const unsigned char* keys, unsigned char* scratch) {
    constexpr int kScratchRow = 2 * 32 + kChunk;
    constexpr int kEach = kNumbers < 16 ? kNumbers : 16;  // of a thread's share, for 16 or 32 keys
    constexpr int kSteps = kEach / 2;                     // of 4 keys
    static_assert(kNumbers % kEach == 0);
    const int lane = lane_index(), own = (lane & 3) + 4 * (lane >> 4);
#pragma unroll
    for (int first = 0; first < kNumbers; first += kEach) {
      uint2 a[kGradients][kSteps];
#pragma unroll
      for (int block = 0; block < kGradients; ++block) {
        __syncwarp();
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
#pragma unroll
          for (int i = 0; i < kEach / 2; i += 2)
            *reinterpret_cast<unsigned*>(scratch + Places::row(slot) * kScratchRow +
                                         2 * Places::column(number_of(slot, i))) =
                pack<Half>(g[block][first + number_of(slot, i)], g[block][first + number_of(slot, i + 1)]);
        __syncwarp();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          a[block][step] = *reinterpret_cast<const uint2*>(
              scratch + (8 * Places::pair_row() + own) * kScratchRow + 8 * step);
      }
#pragma unroll
      for (int column = 0; column < kColumns / 8; ++column)  // of 16 dimensions
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 n = *reinterpret_cast<const uint2*>(
              keys + (2 * first + 4 * step + (lane & 3)) * kStride + 32 * column +
              2 * (8 * Places::pair_column() + 4 * (lane >> 4)));
#pragma unroll
          for (int block = 0; block < kGradients; ++block)
            multiply_rows(&grad[block][8 * column], a[block][step].x, a[block][step].y, n.x, n.y);
        }
    }
  }

 private:
  // Four numbers of depth: B by columns, as rows of keys are stored, or by rows.
  __device__ static void multiply_columns(float* c, unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ < 750
    asm volatile(
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
#endif
  }
  __device__ static void multiply_rows(float* c, unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ < 750
    asm volatile(
        "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
#endif
  }
};

template <typename Operand, Precision kPrecision, int kRowBytes>
struct Engine {
  using type = WarpProduct<Operand, kPrecision, kRowBytes>;
};
#if __CUDA_ARCH__ < 800
template <Precision kPrecision, int kRowBytes>
struct Engine<float, kPrecision, kRowBytes> {
  using type = ThreadProduct<kRowBytes>;
};
#endif
#if __CUDA_ARCH__ < 750
template <int kRowBytes>
struct Engine<Half, Precision::half, kRowBytes> {
  using type = QuadPairProduct<kRowBytes>;
};
#endif

}  // namespace contrastive_ops
