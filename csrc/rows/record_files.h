// Fixed-size records in flat, sparse files: what was never written takes no space and reads as zeros.

#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace contrastive_ops {

// Becomes Python's OSError.
struct FileError {
  int number;  // errno
  std::string path;
};

// Threads, started when first of use, that share out the tasks of one call at a time with its caller.
class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {}

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // task(0), …, task(count - 1); throws what the first of them to fail threw, and then starts no others.
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    while (count > 1 && static_cast<int>(helpers_.size()) + 1 < size_) {
      helpers_.emplace_back([this] { help(); });
    }
    std::unique_lock lock(mutex_);
    task_ = &task;
    next_ = 0, count_ = unfinished_ = count;
    error_ = nullptr;
    if (count > 1) wake_.notify_all();
    while (next_ < count_) step(lock);
    done_.wait(lock, [this] { return unfinished_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void help() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || next_ < count_; });
      if (stop_) return;
      step(lock);
    }
  }

  void step(std::unique_lock<std::mutex>& lock) {
    const int64_t i = next_++;
    std::exception_ptr error;
    lock.unlock();
    try {
      (*task_)(i);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) {
      if (!error_) error_ = error;
      unfinished_ -= count_ - next_;
      next_ = count_;
    }
    if (--unfinished_ == 0) done_.notify_all();
  }

  const int size_;
  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t next_ = 0, count_ = 0, unfinished_ = 0;
  std::exception_ptr error_;
  bool stop_ = false;
};

// Records 0 .. count - 1 in files <stem>.00000, <stem>.00001, …, each of the same power of two of records.
// Calls from several threads wait for one another.
class RecordFiles {
 public:
  RecordFiles(std::string stem, int64_t record_bytes, int64_t count, int threads)
      : stem_(std::move(stem)), record_bytes_(record_bytes), count_(count), pool_(threads) {
    if (record_bytes < 1 || count < 1 || threads < 1) {
      throw std::invalid_argument("record_bytes, count and threads must be at least 1");
    }
    shard_records_ = std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(kShardBytes / record_bytes, 1)));
    while ((count - 1) / shard_records_ >= kMaxShards) shard_records_ *= 2;
    files_.resize((count - 1) / shard_records_ + 1, -1);
  }

  ~RecordFiles() { close(); }

  int64_t record_bytes() const { return record_bytes_; }

  // data (n x record_bytes) = the records, in the order of the indices.
  void read(const int64_t* indices, int64_t n, char* data) { transfer<false>(indices, n, data); }

  // The indices must be distinct. When it throws, any of the records may have been written, in part or whole.
  void write(const int64_t* indices, int64_t n, const char* data) {
    transfer<true>(indices, n, const_cast<char*>(data));
  }

  void close() {
    std::lock_guard lock(mutex_);
    for (int& file : files_) {
      if (file >= 0) ::close(file);
      file = -1;
    }
    closed_ = true;
  }

 private:
  static constexpr int64_t kShardBytes = int64_t{16} << 30, kMaxShards = 256;
  static constexpr int64_t kTaskRuns = 32;

  // Neighbouring records that are neighbours in the caller's array too.
  struct Run {
    int64_t shard, offset, bytes;
    char* data;
  };

  template <bool kWrite>
  void transfer(const int64_t* indices, int64_t n, char* data) {
    std::lock_guard lock(mutex_);
    if (closed_) throw std::invalid_argument("the files " + stem_ + ".* are closed");
    for (int64_t i = 0; i < n; ++i) {
      if (indices[i] < 0 || indices[i] >= count_) {
        throw std::invalid_argument("indices must be in [0, " + std::to_string(count_) + "), got " +
                                    std::to_string(indices[i]) + " at position " + std::to_string(i));
      }
    }
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });

    std::vector<Run> runs;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = order[k], index = indices[i];
      if (kWrite && k > 0 && indices[order[k - 1]] == index) {
        throw std::invalid_argument("indices must be distinct, got " + std::to_string(index) + " twice");
      }
      const Run run{index / shard_records_, index % shard_records_ * record_bytes_, record_bytes_,
                    data + i * record_bytes_};
      if (!runs.empty() && run.shard == runs.back().shard &&
          run.offset == runs.back().offset + runs.back().bytes &&
          run.data == runs.back().data + runs.back().bytes) {
        runs.back().bytes += record_bytes_;
      } else {
        runs.push_back(run);
      }
    }
    for (const Run& run : runs) open<kWrite>(run.shard);

    const auto size = static_cast<int64_t>(runs.size());
    pool_.run((size + kTaskRuns - 1) / kTaskRuns, [&](int64_t task) {
      for (int64_t r = task * kTaskRuns; r < std::min((task + 1) * kTaskRuns, size); ++r) {
        transfer<kWrite>(runs[r]);
      }
    });
  }

  template <bool kWrite>
  void transfer(Run run) const {
    const int file = files_[run.shard];
    while (run.bytes > 0) {
      ssize_t done = 0;  // of a file that does not exist there is nothing to read
      if constexpr (kWrite) {
        done = ::pwrite(file, run.data, run.bytes, run.offset);
        if (done == 0) errno = ENOSPC, done = -1;
      } else if (file >= 0) {
        done = ::pread(file, run.data, run.bytes, run.offset);
      }
      if (done < 0) {
        if (errno == EINTR) continue;
        throw FileError{errno, path(run.shard)};
      }
      if (done == 0) {  // past the end
        std::memset(run.data, 0, run.bytes);
        return;
      }
      run.data += done, run.offset += done, run.bytes -= done;
    }
  }

  template <bool kWrite>
  void open(int64_t shard) {
    int& file = files_[shard];
    while (file < 0) {
      file = ::open(path(shard).c_str(), O_RDWR | O_CLOEXEC | (kWrite ? O_CREAT : 0), 0666);
      if (file >= 0) {
#ifdef POSIX_FADV_RANDOM
        ::posix_fadvise(file, 0, 0, POSIX_FADV_RANDOM);  // else each miss would read its neighbourhood too
#endif
      } else if (!kWrite && errno == ENOENT) {
        return;
      } else if (errno != EINTR) {
        throw FileError{errno, path(shard)};
      }
    }
  }

  std::string path(int64_t shard) const {
    char number[16];
    std::snprintf(number, sizeof number, ".%05d", static_cast<int>(shard));
    return stem_ + number;
  }

  const std::string stem_;
  const int64_t record_bytes_, count_;
  int64_t shard_records_;
  std::vector<int> files_;  // of each shard its descriptor, or -1: not opened yet, or absent
  bool closed_ = false;
  std::mutex mutex_;
  Pool pool_;
};

}  // namespace contrastive_ops
