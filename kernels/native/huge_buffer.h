// Zeroed memory on huge pages where the system gives them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace pio {

// Weights are read from end to end each step: on 4 KB pages the address translation alone costs
// some percent, and the hardware's prefetch stops at each page's end.
class HugeBuffer {
 public:
  HugeBuffer() = default;

  // So many bytes and no more: what is less than a huge page at the end lies on plain ones, so that
  // the many weights of a model take no more memory than they are large.
  explicit HugeBuffer(size_t num_bytes) {
    // The mapping has room for a begin at a huge page's border.
    mapped_bytes_ = num_bytes + kHugePage;
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                    0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    data_ = reinterpret_cast<std::byte*>((address + kHugePage - 1) / kHugePage * kHugePage);
    const size_t whole = num_bytes / kHugePage * kHugePage;
    if (whole > 0) madvise(data_, whole, MADV_HUGEPAGE);  // a wish: plain pages serve too
    // Where huge pages are the system's rule, it would give one for the few bytes behind as well.
    if (num_bytes > whole) madvise(data_ + whole, num_bytes - whole, MADV_NOHUGEPAGE);
  }

  // For scratch memory, of which there is little: at least so many bytes, all on huge pages.
  static HugeBuffer whole_pages(size_t num_bytes) {
    return HugeBuffer((num_bytes + kHugePage - 1) / kHugePage * kHugePage);
  }

  // Memory that belongs to others and outlives this view of it.
  static HugeBuffer view(std::byte* data) {
    HugeBuffer buffer;
    buffer.data_ = data;
    return buffer;
  }

  HugeBuffer(HugeBuffer&& other) noexcept { swap(other); }
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~HugeBuffer() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  }

  std::byte* data() const { return data_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  void swap(HugeBuffer& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
  }

  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
};

// Scratch memory of one thread that grows and is kept: a step allocates nothing once it is warm.
template <class T>
class KeptBuffer {
 public:
  // At least `count` elements, aligned to 64 bytes; earlier contents are lost where it grows.
  T* get(size_t count) {
    if (count > count_) {
      buffer_ = HugeBuffer::whole_pages(count * sizeof(T));
      count_ = count;
    }
    return reinterpret_cast<T*>(buffer_.data());
  }

 private:
  HugeBuffer buffer_;
  size_t count_ = 0;
};

}  // namespace pio
