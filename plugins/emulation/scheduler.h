// The engine of the host emulation: runs a kernel's blocks and threads as fibers on one CPU
// thread, in random order. cuda_emulation.h, which the kernels include, is written on top.
//
// What it finds: a barrier that some threads miss or reach at another place, a warp operation
// that not all 32 lanes reach, reads of shared memory nobody wrote (it is filled with noise
// before every block), accesses past the end of shared memory (a guard page follows it), and
// results that depend on the order of blocks, or of threads between two barriers: there the warps
// go side by side, or one far ahead of the other, by chance.
// What it does not model is listed in cuda_emulation.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace bitnet_emulation {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Read by the running kernel as threadIdx and so on; set by the scheduler.
struct Place {
  Dim3 thread_idx, block_idx, block_dim, grid_dim;
};
extern thread_local Place g_place;

// Seeds the order of blocks and threads, and the noise in shared memory.
void SetSeed(uint64_t seed);

// Runs body once per thread of the grid. Returns false for a launch CUDA would refuse: more
// than 1024 threads or 48 KiB of shared memory a block, a grid too large, or an empty one.
bool Run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body);

// From now on launches are only checked, none runs: for shapes too large to run here.
void OnlyCheckLaunches(bool only);

// Barriers that threads have reached so far, as "file:line", once each.
std::vector<std::string> ReachedBarriers();

// From now on this barrier is none, as if it had been left out of the kernel: to prove that a
// test would notice. An empty name: all are there again.
void LeaveOutBarrier(const std::string& where);

// The running block's dynamic shared memory.
void* SharedMemory();

// __syncthreads(). where names the call: all threads of a block must wait at the same one.
void SyncThreads(const char* where);

// One warp-wide operation. Every lane brings `in` (bytes long, at most 64); once all 32 came,
// combine(in, out) is called once with both arrays of 32 slots, and each lane gets its own
// slot of `out`. Slots are 64 bytes apart.
inline constexpr size_t kSlotBytes = 64;
using Combine = void (*)(const unsigned char* in, unsigned char* out);
void WarpOperation(const char* what, const void* in, size_t in_bytes, void* out,
                   size_t out_bytes, Combine combine);

// Prints the kernel position and the message, then aborts: a test that gets here has failed.
[[noreturn]] void Fail(const char* message);

}  // namespace bitnet_emulation
