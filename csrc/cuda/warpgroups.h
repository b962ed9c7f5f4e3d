// Products by groups of four warps, on Hopper: wgmma multiplies 64 rows, which warps hold in registers or
// leave in shared memory, by keys in shared memory, which the units read by themselves. It does so while the
// warps go on: what `similarities` and `accumulate` have begun is done when `land` returns.
//
// Only compute capability 9.0 has them, so what is compiled for it is for no later one ("sm_90a").
#pragma once

#include "products.h"

namespace contrastive_ops {

// Rows as the units read them: panels of up to 128 bytes of all rows, in which the chunks of 16 bytes of a
// row are swizzled, so that those that 8 rows have at one place lie in different groups of banks.
template <int kRows, int kRowBytes>
struct Swizzled {
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle, which is one of addresses
  static constexpr int kWidth = kRowBytes < 128 ? kRowBytes : 128, kStride = kWidth, kPeriod = 8;
  static constexpr int kPanelBytes = kRows * kWidth;
  static_assert(kRowBytes % kWidth == 0 && 8 * kWidth % 256 == 0 && kBytes % kAlignment == 0);

  __device__ static int offset(int row, int chunk) {
    constexpr int kChunks = kWidth / kChunk;
    return chunk / kChunks * kPanelBytes + row * kWidth +
           kChunk * ((chunk % kChunks) ^ (row * kWidth / 128 % kChunks));
  }
  // What tells the units where operands begin and how they lie: 8 rows after 8 rows, and where the numbers of
  // a column are multiplied, panel after panel.
  struct Descriptor {
    unsigned long long bits;

    __device__ explicit Descriptor(const unsigned char* matrix)
        : bits(shared_address(matrix) / 16 | static_cast<unsigned long long>(kPanelBytes / 16) << 16 |
               static_cast<unsigned long long>(8 * kWidth / 16) << 32 |
               (kWidth == 128  ? 1ull
                : kWidth == 64 ? 2ull
                               : 3ull)
                   << 62) {}

    // Of 32 bytes of depth of the rows from `first` on, a multiple of 8.
    __device__ unsigned long long of_step(int first, int step) const {
      return bits + (32 * step / kWidth * kPanelBytes + 32 * step % kWidth + first * kWidth) / 16;
    }
    // Of columns from some byte on, a multiple of a panel's width, whose depth are 16 rows.
    __device__ unsigned long long of_columns(int first_row, int first_byte) const {
      return bits + (first_byte / kWidth * kPanelBytes + first_row * kWidth) / 16;
    }
  };
};

// What was stored to shared memory before is seen by the units, once a barrier has told that it was.
__device__ inline void show_to_products() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Registers that products read or write may be used as others are until here.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// An instruction: c = a b, or c += a b where `adds`, of a thread's kNumbers of c, 32 bytes of depth. a is a
// fragment or a descriptor, b a descriptor; kColumns says that the numbers of a column of b are multiplied.
template <typename Operand, int kNumbers, bool kColumns>
struct GroupProduct;

#define CONTRASTIVE_OPS_8(c)                                                                        \
  "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3]), "+f"((c)[4]), "+f"((c)[5]), "+f"((c)[6]), \
      "+f"((c)[7])
#define CONTRASTIVE_OPS_16(c) CONTRASTIVE_OPS_8(c), CONTRASTIVE_OPS_8((c) + 8)
#define CONTRASTIVE_OPS_32(c) CONTRASTIVE_OPS_16(c), CONTRASTIVE_OPS_16((c) + 16)
#define CONTRASTIVE_OPS_64(c) CONTRASTIVE_OPS_32(c), CONTRASTIVE_OPS_32((c) + 32)
#define CONTRASTIVE_OPS_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CONTRASTIVE_OPS_NAMES_16 CONTRASTIVE_OPS_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CONTRASTIVE_OPS_NAMES_32                                                  \
  CONTRASTIVE_OPS_NAMES_16                                                        \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define CONTRASTIVE_OPS_NAMES_64                                                  \
  CONTRASTIVE_OPS_NAMES_32                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
  "%62, %63"

// a0 to a6 are the names of what follows the numbers.
#define CONTRASTIVE_OPS_GROUP_PRODUCT(Kind, kind, count, n, a0, a1, a2, a3, a4, a5, a6)                     \
  template <bool kColumns>                                                                                  \
  struct GroupProduct<Kind, count, kColumns> {                                                              \
    __device__ static void multiply(float* c, const RowFragment& a, unsigned long long b, int adds) {       \
      asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " a5 ", 0; wgmma.mma_async.sync.aligned.m64n" n    \
                   "k16.f32." kind "." kind " {" CONTRASTIVE_OPS_NAMES_##count                              \
                   "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " a4 ", adds, 1, 1, " a6 "; }"                     \
                   : CONTRASTIVE_OPS_##count(c)                                                             \
                   : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"(adds),                 \
                     "n"(int{kColumns})                                                                     \
                   : "memory");                                                                             \
    }                                                                                                       \
    __device__ static void multiply(float* c, unsigned long long a, unsigned long long b, int adds) {       \
      asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " a2 ", 0; wgmma.mma_async.sync.aligned.m64n" n    \
                   "k16.f32." kind "." kind " {" CONTRASTIVE_OPS_NAMES_##count "}, " a0 ", " a1             \
                                                                               ", adds, 1, 1, 0, " a3 "; }" \
                   : CONTRASTIVE_OPS_##count(c)                                                             \
                   : "l"(a), "l"(b), "r"(adds), "n"(int{kColumns})                                          \
                   : "memory");                                                                             \
    }                                                                                                       \
  }
#define CONTRASTIVE_OPS_GROUP_PRODUCTS(Kind, kind)                                                      \
  CONTRASTIVE_OPS_GROUP_PRODUCT(Kind, kind, 8, "16", "%8", "%9", "%10", "%11", "%12", "%13", "%14");    \
  CONTRASTIVE_OPS_GROUP_PRODUCT(Kind, kind, 16, "32", "%16", "%17", "%18", "%19", "%20", "%21", "%22"); \
  CONTRASTIVE_OPS_GROUP_PRODUCT(Kind, kind, 32, "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38"); \
  CONTRASTIVE_OPS_GROUP_PRODUCT(Kind, kind, 64, "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70")

CONTRASTIVE_OPS_GROUP_PRODUCTS(Half, "f16");
CONTRASTIVE_OPS_GROUP_PRODUCTS(BFloat16, "bf16");

#undef CONTRASTIVE_OPS_GROUP_PRODUCTS
#undef CONTRASTIVE_OPS_GROUP_PRODUCT
#undef CONTRASTIVE_OPS_NAMES_64
#undef CONTRASTIVE_OPS_NAMES_32
#undef CONTRASTIVE_OPS_NAMES_16
#undef CONTRASTIVE_OPS_NAMES_8
#undef CONTRASTIVE_OPS_64
#undef CONTRASTIVE_OPS_32
#undef CONTRASTIVE_OPS_16
#undef CONTRASTIVE_OPS_8

// The engine of half precision on Hopper; see products.h. A thread's share is that of a warp's products.
template <typename Operand, int kRowBytes>
class WarpgroupProduct {
 public:
  static constexpr bool kFromRegisters = true;
  static constexpr bool kIsAsync = true;
  static constexpr int kScratchBytes = 0;
  using Places = Share<false>;
  template <int kRows>
  using Layout = Swizzled<kRows, kRowBytes>;

  template <int kRows>
  __device__ static RowFragment load_rows(const unsigned char* block, int step) {
    const int lane = lane_index();
    RowFragment fragment;
    load_matrices(fragment.x,
                  block + Layout<kRows>::offset(16 * warp_index() + (lane & 15), 2 * step + (lane >> 4)));
    return fragment;
  }
  template <int kRows>
  __device__ static unsigned long long rows_at(const unsigned char* block, int step) {
    return typename Layout<kRows>::Descriptor(block).of_step(kRows > 64 ? 64 * (warp_index() >> 2) : 0, step);
  }

  template <int kSteps, bool kAdds, int kBlocks, int kNumbers, typename Fragment>
  __device__ static void similarities(float (&s)[kBlocks][kNumbers], const Fragment& fragment,
                                      const unsigned char* keys) {
    const typename Layout<2 * kNumbers>::Descriptor operand(keys);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
        GroupProduct<Operand, kNumbers, false>::multiply(s[block], fragment(block, step),
                                                         operand.of_step(0, step), kAdds || step > 0);
    commit_products();
  }

  // 16 keys of g of the blocks that have a gradient, each a fragment.
  template <int kGradients, int kNumbers>
  struct PackedRows {
    RowFragment of[kGradients][kNumbers / 8];
  };
  template <int kGradients, int kBlocks, int kNumbers>
  __device__ static auto pack_rows(const float (&g)[kBlocks][kNumbers]) {
    PackedRows<kGradients, kNumbers> rows;
#pragma unroll
    for (int block = 0; block < kGradients; ++block)
#pragma unroll
      for (int i = 0; i < kNumbers / 2; ++i)
        rows.of[block][i / 4].x[i % 4] = pack<Operand>(g[block][2 * i], g[block][2 * i + 1]);
    return rows;
  }

  template <int kGradients, int kColumns, int kNumbers>
  __device__ static void accumulate(float (&grad)[kGradients][kColumns],
                                    const PackedRows<kGradients, kNumbers>& g, const unsigned char* keys) {
    constexpr int kEach = kColumns < 64 ? kColumns : 64;  // of an instruction
    static_assert(kColumns % kEach == 0);
    const typename Layout<2 * kNumbers>::Descriptor operand(keys);
    begin_products();
#pragma unroll
    for (int first = 0; first < kNumbers / 8; ++first)
#pragma unroll
      for (int column = 0; column < kColumns; column += kEach)
#pragma unroll
        for (int block = 0; block < kGradients; ++block)
          GroupProduct<Operand, kEach, true>::multiply(grad[block] + column, g.of[block][first],
                                                       operand.of_columns(16 * first, 4 * column), 1);
    commit_products();
  }

  template <int kLeft>
  __device__ static void land() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  }
  template <int kLeft, int kBlocks, int kNumbers>
  __device__ static void land(float (&x)[kBlocks][kNumbers]) {
    land<kLeft>();
    // From here on x is what products have written.
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) asm volatile("" : "+f"(x[block][i])::"memory");
  }
};

template <int kRowBytes>
struct Engine<Half, Precision::half, kRowBytes> {
  using type = WarpgroupProduct<Half, kRowBytes>;
};
template <int kRowBytes>
struct Engine<BFloat16, Precision::half, kRowBytes> {
  using type = WarpgroupProduct<BFloat16, kRowBytes>;
};

#endif

}  // namespace contrastive_ops
