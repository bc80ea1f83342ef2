// Memory for kernel tests. Host emulation: each buffer ends where an inaccessible page begins, so
// that an access past its end stops the test at the faulty line, and bytes in front of it are
// checked. With BITNET_TEST_ON_DEVICE: device memory, where compute-sanitizer does that work.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef BITNET_TEST_ON_DEVICE
#include <cuda_runtime_api.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

class DeviceBuffer {
 public:
  // Filled with `poison`. On the host the end is exact for any size, so the start is aligned to
  // the largest power of two that divides bytes; sizes of aligned arrays keep them aligned.
  DeviceBuffer(size_t bytes, unsigned char poison) : bytes_(bytes) {
    Allocate();
    Fill(poison);
  }
  DeviceBuffer(const void* data, size_t bytes) : DeviceBuffer(bytes, 0) { Write(data); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  template <class T = void>
  T* get() const {
    return static_cast<T*>(pointer_);
  }
  size_t bytes() const { return bytes_; }

#ifdef BITNET_TEST_ON_DEVICE
  ~DeviceBuffer() { cudaFree(pointer_); }
  void Fill(unsigned char value) { Check(cudaMemset(pointer_, value, bytes_)); }
  void Write(const void* data) { Check(cudaMemcpy(pointer_, data, bytes_, cudaMemcpyDefault)); }
  void Read(void* data) const { Check(cudaMemcpy(data, pointer_, bytes_, cudaMemcpyDefault)); }
  bool FrontIntact() const { return true; }

 private:
  static void Check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
  void Allocate() { Check(cudaMalloc(&pointer_, bytes_ ? bytes_ : 1)); }
#else
  ~DeviceBuffer() { munmap(map_, map_bytes_); }
  void Fill(unsigned char value) { std::memset(pointer_, value, bytes_); }
  void Write(const void* data) { std::memcpy(pointer_, data, bytes_); }
  void Read(void* data) const { std::memcpy(data, pointer_, bytes_); }
  bool FrontIntact() const {
    for (const unsigned char* p = map_; p < static_cast<unsigned char*>(pointer_); ++p) {
      if (*p != kFront) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kFront = 0x5a;
  void Allocate() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes_ + 64 + page - 1) / page * page;
    map_bytes_ = usable + page;
    void* map = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<unsigned char*>(map);
    mprotect(map_ + usable, page, PROT_NONE);
    std::memset(map_, kFront, usable);
    pointer_ = map_ + usable - bytes_;
  }
  unsigned char* map_ = nullptr;
  size_t map_bytes_ = 0;
#endif
  void* pointer_ = nullptr;
  size_t bytes_;
};
