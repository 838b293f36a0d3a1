// What the convolutions in both precisions share: memory, threads, and what XLA hands over.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using std::int64_t;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized memory of a call, freed with its owner.
class Buffer {
 public:
  float* of(int64_t count) {
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(ceil_div(count, 16), 1) * 64)));
    if (!memory_) throw std::bad_alloc();
    return memory_.get();
  }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_{nullptr, &std::free};
};

// Memory of a thread, kept from call to call. Growing discards its contents. It is not from the heap, where it would
// come to lie above the memory of XLA's step. The next step could not have that again (glibc's memalign looks for some
// bytes more than it takes), and the process would keep two of them.
class Pages {
 public:
  ~Pages() { free(); }
  float* of(int64_t count) {
    if (count > size_) {
      free();
      void* memory = mmap(nullptr, 4 * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<float*>(memory);
      size_ = count;
    }
    return memory_;
  }

 private:
  void free() {
    if (size_) munmap(memory_, 4 * size_);
    size_ = 0;
  }
  float* memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local Pages scratch;

// Runs item(0), ..., item(count - 1) on the pool's threads and on the calling one. If all threads of the pool are busy,
// the calling thread runs every item itself, so this cannot deadlock. Each thread begins with a share of its own, the
// calling one with the first as in XLA's loops, and then helps with the others: on cores with separate caches most of
// what a core reads is what it wrote.
template <typename Item>
void parallel(ffi::ThreadPool& pool, int64_t count, const Item& item) {
  struct Progress {
    explicit Progress(int64_t shares) : begun(shares) {}
    std::vector<std::atomic<int64_t>> begun;
    std::atomic<int64_t> done{0};
    std::atomic<bool> failed{false};
  };
  int64_t shares = std::max<int64_t>(std::min(pool.num_threads(), count), 1);
  auto progress = std::make_shared<Progress>(shares);
  auto work = [progress, shares, count, &item](int64_t own) {
    for (int64_t k = 0; k < shares; k++) {
      int64_t share = (own + k) % shares, first = share * count / shares, end = (share + 1) * count / shares;
      for (int64_t i; (i = first + progress->begun[share].fetch_add(1)) < end; progress->done.fetch_add(1)) try {
          item(i);
        } catch (const std::bad_alloc&) {
          progress->failed = true;
        }
    }
  };
  for (int64_t helper = 1; helper < shares; helper++) pool.Schedule([work, helper] { work(helper); });
  work(0);
  while (progress->done.load() < count) std::this_thread::yield();
  if (progress->failed) throw std::bad_alloc();
}

// Calls rows(first, last) in parallel on blocks of at most `most` of `count` rows. If the rows suffice, the number of
// blocks is about a multiple of the number of threads, so that all threads get equally many.
template <typename Rows>
void parallel_blocks(ffi::ThreadPool& pool, int64_t count, int64_t most, const Rows& rows) {
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t size = ceil_div(count, ceil_div(ceil_div(count, most), threads) * threads);
  parallel(pool, ceil_div(count, size), [&](int64_t i) { rows(i * size, std::min(count, (i + 1) * size)); });
}

// The most groups that a kernel gradient's sum over pictures is split into. It is a constant, not the number of
// threads: results must not depend on how many threads there are.
constexpr int64_t kGroups = 8;

// Arguments are x, gain and shift of each part, then the others. An empty array: no gain, no shift or no bias.
using Flags = ffi::Span<const int64_t>;

const float* optional(Array x) { return x.element_count() ? x.typed_data() : nullptr; }

template <typename Run>
ffi::Error checked(const Run& run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a convolution");
  }
}

auto binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<Flags>("relu"); }

}  // namespace

#define HANDLER(name, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(unet_jax_##name, name, binding.RemainingArgs().RemainingRets())
