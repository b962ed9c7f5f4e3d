// A program holds blocks of rows and walks a range of keys, a tile at a time: the loop of all kernels that
// compute similarities.
//
// A warp holds 16 rows of one or two blocks (query and key of CO2, both views of NT-Xent, or twice as many
// views of ConIC), so that a fragment of keys from shared memory is multiplied twice. It has all keys of a
// tile to itself, so warps exchange nothing; a barrier a step tells that its tile is there for all, and that
// an earlier one is no longer needed.
//
// Where products are asynchronous a walk is ahead: the similarities of the next tile are computed while a
// kernel makes something of those of this one, and what this one adds to the gradient while it goes on to the
// next.
#pragma once

#include "warpgroups.h"

namespace contrastive_ops {

// How a kernel that walks cuts its work.
//
// Shape: the host's tile, with its fields in lower case
//   rows, keys   that a program holds, and of a step
//   depth        dimensions multiplied at once
//   width        dimensions of the gradient that a program adds up; 0 where there is none
//   chunked      whether rows have more dimensions than `depth`
//   dtype        in which rows are multiplied
// kBlocks, kRows: how many blocks of rows a program holds, and of how many rows. kGradients: of how many
// blocks it adds up gradients. kStages: tiles in flight, the one that is multiplied included. kVectors:
// whether all matrices are read 16 bytes at a time; see TileCopy.
template <class Shape, int kBlocks_, int kRows_, int kGradients_, int kStages_, bool kVectors_>
struct WalkTile {
  using Operand = typename Shape::dtype;
  static constexpr Precision kPrecision = Shape::precision;
  static constexpr int kBlocks = kBlocks_, kGradients = kGradients_;
  static constexpr int kRows = kRows_, kWarps = kRows_ / 16, kThreads = 32 * kWarps;
  static constexpr int kKeys = Shape::keys, kDepth = Shape::depth, kWidth = Shape::width;
  static constexpr bool kChunked = Shape::chunked;
  static constexpr bool kVectors = kVectors_;

  static constexpr int kRowBytes = kDepth * static_cast<int>(sizeof(Operand));
  static constexpr int kSteps = kRowBytes / 32;
  using Product = typename Engine<Operand, kPrecision, kRowBytes>::type;
  using Places = typename Product::Places;
  using Block = typename Product::template Layout<kRows>;
  using Keys = typename Product::template Layout<kKeys>;

  // Tiles that are not to be written yet when another begins to be copied: the one that is multiplied, and
  // where a walk is ahead with a gradient, the one before it.
  static constexpr bool kAhead = Product::kIsAsync && !kChunked;
  static constexpr int kInUse = kAhead && kWidth > 0 ? 2 : 1;
  static constexpr int kStages = kStages_ > kInUse + 1 ? kStages_ : kInUse + 1;

  // Rows that are not loaded again for every tile stay in registers, where these hold them beside the
  // gradients.
  static constexpr int kHeldRegisters = kBlocks * kRowBytes / 8;
  static constexpr bool kInRegisters =
      !kChunked && Product::kFromRegisters && kHeldRegisters + kGradients * kWidth / 2 <= 128;
  static constexpr int kNumbers = kKeys / 2;  // of a tile, a thread's share
  static constexpr int kWidthChunks = kChunked ? kWidth / kDepth : 0;
  static_assert(!kChunked || kWidth % kDepth == 0);
  static_assert(kKeys % 16 == 0 && kDepth % 16 == 0);
};

// A thread's share of a row of a block's gradient, times a factor, to where the row begins, at a multiple of
// 8 bytes.
template <class Tile, int kColumns>
__device__ void store_share(float* row, const float (&grad)[kColumns], int slot, float factor) {
#pragma unroll
  for (int i = 0; i < Tile::kWidth / 4; i += 2)
    *reinterpret_cast<float2*>(row + Tile::Places::column(number_of(0, i))) =
        make_float2(grad[number_of(slot, i)] * factor, grad[number_of(slot, i + 1)] * factor);
}

extern __shared__ uint4 shared_memory[];

// The host finds this constant in the compiled kernel, and reserves as much for a launch.
template <int kBytes>
struct SharedMemory {
  static constexpr int contrastive_ops_shared_bytes = kBytes;
};

// The rows of a tile's steps, from global to shared memory and to registers.
//
// T1, T2, N: numbers of the blocks and of the keys as they are stored. kBytesAfter: what a program needs when
// the walk is over.
template <class Tile, typename T1, typename T2, typename N, int kBytesAfter = 0>
class Walk {
  static constexpr int kBlocks = Tile::kBlocks;
  using Operand = typename Tile::Operand;
  using Product = typename Tile::Product;
  static constexpr int kBlockBytes = Tile::Block::kBytes, kKeyBytes = Tile::Keys::kBytes;
  static constexpr bool kHeldInShared = !Tile::kChunked && !Tile::kInRegisters;
  static constexpr int kHeldBytes = kHeldInShared ? kBlocks * kBlockBytes : 0;
  static constexpr int kStageBytes = kKeyBytes + (Tile::kChunked ? kBlocks * kBlockBytes : 0);
  static constexpr int kScratch = kHeldBytes + Tile::kStages * kStageBytes;
  static constexpr int kBytes = kScratch + (Tile::kWidth ? Tile::kWarps * Product::kScratchBytes : 0);
  static constexpr int kOtherBytes =
      kBlockBytes > kBytesAfter ? kBlockBytes : kBytesAfter;  // before, or after
  // Memory begins at a multiple of `kChunk`, and is used from where the layout wants it.
  static constexpr int kAlignment = Tile::Keys::kAlignment;
  static_assert(SharedMemory<(kBytes > kOtherBytes ? kBytes : kOtherBytes) + kAlignment -
                             kChunk>::contrastive_ops_shared_bytes > 0);
  template <typename T, typename Layout, int kRows>
  using Copy = TileCopy<Operand, T, Tile::kVectors, kRows, Tile::kDepth, Tile::kThreads, Layout>;
  using Similarities = float[kBlocks][Tile::kNumbers];

 public:
  __device__ Walk(const Rows<T1>& rows1, const Rows<T2>& rows2, int64 first_row1, int64 first_row2,
                  const Rows<N>& keys, int64 begin, int64 end, int64 first_out_column)
      : rows1_(rows1),
        rows2_(rows2),
        keys_(keys),
        first_row1_(first_row1),
        first_row2_(first_row2),
        begin_(begin),
        end_(end),
        first_out_column_(first_out_column),
        chunks_(Tile::kChunked ? static_cast<int>((keys.dim + Tile::kDepth - 1) / Tile::kDepth) : 1) {}

  // Before the first walk. Rows that stay are loaded once.
  __device__ void hold() {
    if constexpr (Tile::kInRegisters) {
      hold_in_registers<0>(rows1_, first_row1_);
      if constexpr (kBlocks == 2) hold_in_registers<1>(rows2_, first_row2_);
    } else if constexpr (kHeldInShared) {
      hold_in_shared(rows1_, first_row1_, 0);
      if constexpr (kBlocks == 2) hold_in_shared(rows2_, first_row2_, 1);
    }
  }

  // Calls use(s, key) for each tile in its order, with its similarities s[block] = X_block N^T, which it may
  // write to, and its first key.
  template <typename Use>
  __device__ void each_tile(Use use) {
    static_assert(Tile::kWidth == 0);
    start();
    int64 key = begin_;
    if constexpr (Tile::kAhead) {
      Similarities s[2];
      begin_tile(s[0]);
#pragma unroll 1
      for (; key + 2 * Tile::kKeys < end_; key += 2 * Tile::kKeys) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Product::template land<0>(s[i]);
          begin_tile(s[1 - i]);
          use(s[i], key + i * Tile::kKeys);
        }
      }
#pragma unroll 1
      for (;; key += Tile::kKeys) {
        Product::template land<0>(s[0]);
        use(s[0], key);
        if (key + Tile::kKeys >= end_) break;
        begin_tile(s[0]);
      }
    } else {
#pragma unroll 1
      for (; key < end_; key += Tile::kKeys) {
        Similarities s;
        begin_tile(s);
        Product::template land<0>(s);
        use(s, key);
      }
    }
    finish();
  }

  // grad[block] += g[block] N of each tile in its order, where pull(s, key) makes g of its similarities, in
  // their place; the gradients are those of the first blocks.
  template <int kGradients, int kColumns, typename Pull>
  __device__ void add_gradients(float (&grad)[kGradients][kColumns], Pull pull) {
    static_assert(kGradients == Tile::kGradients && kColumns == Tile::kWidth / 2);
    start();
    int64 key = begin_;
    Similarities s;
    if constexpr (Tile::kAhead) {
      const unsigned char* tile = begin_tile(s);
      Product::template land<0>(s);
      pull(s, key);
      auto g = Product::template pack_rows<kGradients>(s);
#pragma unroll 1
      for (key += Tile::kKeys; key < end_; key += Tile::kKeys) {
        const unsigned char* next_tile = begin_tile(s);
        Product::accumulate(grad, g, tile);
        Product::template land<1>(s);
        pull(s, key);
        Product::template land<0>();  // what products read is not to be written before
        g = Product::template pack_rows<kGradients>(s);
        tile = next_tile;
      }
      Product::accumulate(grad, g, tile);
      Product::template land<0>(grad);
    } else {
#pragma unroll 1
      for (; key < end_; key += Tile::kKeys) {
        [[maybe_unused]] const unsigned char* tile = begin_tile(s);
        Product::template land<0>(s);
        pull(s, key);
        if constexpr (Tile::kChunked) {
          accumulate_chunks(grad, s);
        } else {
          if constexpr (kFetchesLate) fetch();
          accumulate(grad, s, tile);
        }
      }
    }
    finish();
  }

  // Room for a warp's numbers, after the walk.
  template <typename T, int kCount>
  __device__ T* scratch_of_warp() const {
    static_assert(Tile::kWarps * kCount * static_cast<int>(sizeof(T)) <= kBytesAfter);
    return reinterpret_cast<T*>(shared()) + warp_index() * kCount;
  }

 private:
  using KeyCopy = Copy<N, typename Tile::Keys, Tile::kKeys>;
  static constexpr bool kAsync = KeyCopy::kAsync;
  // A tile on its way through registers would take those that similarities need beside the gradients.
  static constexpr bool kFetchesLate =
      Tile::kVectors && !kHasAsyncCopies && !Tile::kChunked && Tile::kWidth > 0;

  __device__ static unsigned char* shared() {
    unsigned char* const memory = reinterpret_cast<unsigned char*>(shared_memory);
    if constexpr (kAlignment == kChunk) return memory;
    return memory + (-shared_address(memory) & (kAlignment - 1));
  }
  __device__ static unsigned char* stage(int index) { return shared() + kHeldBytes + index * kStageBytes; }
  template <int kBlock, typename T>
  __device__ void hold_in_registers(const Rows<T>& rows, int64 first_row) {
    Copy<T, typename Tile::Block, Tile::kRows> copy;
    __syncthreads();  // what another warp still reads there
    copy.begin(shared(), rows, first_row, 0);
    commit_copies();
    copy.land(shared(), rows);
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step)
      held_[kBlock][step] = Product::template load_rows<Tile::kRows>(shared(), step);
    __syncthreads();
  }

  template <typename T>
  __device__ void hold_in_shared(const Rows<T>& rows, int64 first_row, int block) {
    Copy<T, typename Tile::Block, Tile::kRows> copy;
    unsigned char* to = shared() + block * kBlockBytes;
    copy.begin(to, rows, first_row, 0);
    commit_copies();
    copy.land(to, rows);
    wait_for_copies<0>();
  }

  // Begins to copy what the step after those in flight needs.
  __device__ void fetch() {
    if (key_ < end_) {
      unsigned char* to = stage(fetch_stage_);
      const bool multiplies = chunk_ < chunks_;
      const int64 column = multiplies
                               ? static_cast<int64>(chunk_) * Tile::kDepth
                               : first_out_column_ + static_cast<int64>(chunk_ - chunks_) * Tile::kDepth;
      key_copy_.begin(to, keys_, key_, column);
      if constexpr (Tile::kChunked) {
        if (multiplies) {
          copy1_.begin(to + kKeyBytes, rows1_, first_row1_, column);
          if constexpr (kBlocks == 2) copy2_.begin(to + kKeyBytes + kBlockBytes, rows2_, first_row2_, column);
        }
        is_in_flight_ = multiplies;
      }
      if (++chunk_ == chunks_ + Tile::kWidthChunks) chunk_ = 0, key_ += Tile::kKeys;
      if (++fetch_stage_ == Tile::kStages) fetch_stage_ = 0;
    }
    commit_copies();  // of nothing, too: waits count groups
  }

  // The tile of the next step, which then is in shared memory.
  __device__ const unsigned char* next() {
    unsigned char* tile = stage(stage_);
    key_copy_.land(tile, keys_);
    if constexpr (Tile::kChunked && !kAsync) {
      if (is_in_flight_) {
        copy1_.land(tile + kKeyBytes, rows1_);
        if constexpr (kBlocks == 2) copy2_.land(tile + kKeyBytes + kBlockBytes, rows2_);
      }
    }
    if constexpr (kAsync) wait_for_copies<Tile::kStages - Tile::kInUse - 1>();
    if constexpr (Product::kIsAsync) show_to_products();
    __syncthreads();
    if constexpr (!kFetchesLate) fetch();
    if (++stage_ == Tile::kStages) stage_ = 0;
    return tile;
  }

  // Begins to copy the first tiles.
  __device__ void start() {
    key_ = begin_, chunk_ = 0;
    stage_ = 0, fetch_stage_ = 0;
#pragma unroll
    for (int i = 0; i < (kAsync ? Tile::kStages - Tile::kInUse : 1); ++i) fetch();
  }

  // Nothing may be in flight where a kernel ends, walks again, or uses the memory for something else.
  __device__ static void finish() {
    wait_for_copies<0>();
    Product::template land<0>();
    __syncthreads();
  }

  template <int kGradients, int kColumns>
  __device__ static void accumulate(float (&grad)[kGradients][kColumns], const Similarities& g,
                                    const unsigned char* tile) {
    if constexpr (Product::kIsAsync) {
      Product::accumulate(grad, Product::template pack_rows<kGradients>(g), tile);
      Product::template land<0>(grad);
    } else {
      Product::accumulate(grad, g, tile, shared() + kScratch + warp_index() * Product::kScratchBytes);
    }
  }

  template <int kGradients, int kColumns>
  __device__ void accumulate_chunks(float (&grad)[kGradients][kColumns], const Similarities& g) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kWidthChunks; ++chunk) {
      const unsigned char* tile = next();
      float part[kGradients][Tile::kDepth / 2];
#pragma unroll
      for (int block = 0; block < kGradients; ++block)
#pragma unroll
        for (int i = 0; i < Tile::kDepth / 2; ++i)
          part[block][i] = grad[block][chunk * (Tile::kDepth / 2) + i];
      accumulate(part, g, tile);
#pragma unroll
      for (int block = 0; block < kGradients; ++block)
#pragma unroll
        for (int i = 0; i < Tile::kDepth / 2; ++i)
          grad[block][chunk * (Tile::kDepth / 2) + i] = part[block][i];
    }
  }

  // Begins s = X N^T of the next tile, for each block; the tile.
  __device__ const unsigned char* begin_tile(Similarities& s) {
    const unsigned char* tile = nullptr;
    if constexpr (Tile::kChunked) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int i = 0; i < Tile::kNumbers; ++i) s[block][i] = 0;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        tile = next();
        multiply<true>(s, tile, tile + kKeyBytes);
        Product::template land<0>(s);
      }
    } else {
      tile = next();
      multiply<false>(s, tile, shared());
    }
    return tile;
  }

  template <bool kAdds>
  __device__ void multiply(Similarities& s, const unsigned char* tile, const unsigned char* blocks) const {
    if constexpr (Tile::kInRegisters)
      Product::template similarities<Tile::kSteps, kAdds>(
          s, [&](int block, int step) { return held_[block][step]; }, tile);
    else
      Product::template similarities<Tile::kSteps, kAdds>(
          s,
          [&](int block, int step) {
            return Product::template rows_at<Tile::kRows>(blocks + block * kBlockBytes, step);
          },
          tile);
  }

  const Rows<T1> rows1_;
  const Rows<T2> rows2_;
  const Rows<N> keys_;
  const int64 first_row1_, first_row2_, begin_, end_, first_out_column_;
  const int chunks_;

  int64 key_;  // of the step that is to be copied next, as is `chunk_`
  int chunk_, stage_, fetch_stage_;
  bool is_in_flight_ = false;  // whether rows are, beside keys
  KeyCopy key_copy_;
  Copy<T1, typename Tile::Block, Tile::kRows> copy1_;
  Copy<T2, typename Tile::Block, Tile::kRows> copy2_;
  RowFragment held_[Tile::kInRegisters ? kBlocks : 1][Tile::kInRegisters ? Tile::kSteps : 1];
};

}  // namespace contrastive_ops
