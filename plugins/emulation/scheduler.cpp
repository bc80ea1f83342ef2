// Fibers, barriers and warp operations of the host emulation; scheduler.h says what for.
#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace bitnet_emulation {

thread_local Place g_place;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // without opting in, on every architecture

enum class State { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Dim3 thread_idx;
  State state = State::kReady;
  const char* where = nullptr;  // the barrier or operation it waits at
};

struct Warp {
  alignas(64) unsigned char in[kWarpSize * kSlotBytes];
  alignas(64) unsigned char out[kWarpSize * kSlotBytes];
  unsigned arrived = 0;
};

// Shared memory ends where an inaccessible page begins, so that a read or write past its end
// stops the test at the faulty line.
class GuardedShared {
 public:
  GuardedShared() {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* map = mmap(nullptr, kMaxSharedBytes + page_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) Fail("out of memory");
    base_ = static_cast<unsigned char*>(map);
    mprotect(base_ + kMaxSharedBytes, page_, PROT_NONE);
  }
  ~GuardedShared() { munmap(base_, kMaxSharedBytes + page_); }
  GuardedShared(const GuardedShared&) = delete;
  GuardedShared& operator=(const GuardedShared&) = delete;

  // Kernels ask for multiples of 16 bytes, which keeps the start aligned.
  void Reset(size_t bytes, std::mt19937_64& random) {
    begin_ = base_ + kMaxSharedBytes - bytes;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
      const uint64_t noise = random();
      std::memcpy(begin_ + i, &noise, 8);
    }
  }
  void* begin() const { return begin_; }

 private:
  unsigned char* base_ = nullptr;
  unsigned char* begin_ = nullptr;
  size_t page_ = 0;
};

struct Machine {
  std::mt19937_64 random{1};
  GuardedShared shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
};

thread_local std::unique_ptr<Machine> t_machine;

Machine& machine() {
  if (!t_machine) t_machine = std::make_unique<Machine>();
  return *t_machine;
}

void FiberMain() {
  Machine& m = machine();
  (*m.body)();
  m.fibers[m.current].state = State::kDone;
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

void Wait(State state, const char* where) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  fiber.where = where;
  swapcontext(&fiber.context, &m.scheduler);
}

void StartFibers(Machine& m, Dim3 block) {
  const unsigned count = block.x * block.y * block.z;
  if (m.fibers.size() < count) m.fibers.resize(count);
  m.warps.assign(count / kWarpSize, Warp{});
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
    fiber.thread_idx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, FiberMain, 0);
  }
}

// All threads that have not returned wait: they must do so at one barrier.
void OpenBarrier(Machine& m, unsigned count) {
  const char* where = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = m.fibers[i];
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kAtBarrier) Fail("deadlock: some lanes never reach a warp operation");
    if (where && std::strcmp(where, fiber.where) != 0) Fail("threads wait at different barriers");
    where = fiber.where;
    fiber.state = State::kReady;
  }
}

void RunBlock(Machine& m, Dim3 block) {
  const unsigned count = block.x * block.y * block.z;
  StartFibers(m, block);
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    bool waiting = false;
    for (unsigned i = 0; i < count; ++i) {
      if (m.fibers[i].state == State::kReady) ready.push_back(i);
      waiting |= m.fibers[i].state != State::kDone;
    }
    if (!waiting) return;
    if (ready.empty()) {
      OpenBarrier(m, count);
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), m.random);
    for (unsigned index : ready) {
      m.current = index;
      g_place.thread_idx = m.fibers[index].thread_idx;
      swapcontext(&m.scheduler, &m.fibers[index].context);
    }
  }
}

}  // namespace

void Fail(const char* message) {
  const Dim3 b = g_place.block_idx, t = g_place.thread_idx;
  std::fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u,%u,%u)\n", message, b.x, b.y, b.z,
               t.x, t.y, t.z);
  std::abort();
}

void SetSeed(uint64_t seed) { machine().random.seed(seed); }

void* SharedMemory() { return machine().shared.begin(); }

void SyncThreads(const char* where) { Wait(State::kAtBarrier, where); }

void WarpOperation(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                   Combine combine) {
  Machine& m = machine();
  const unsigned self = m.current, first = self / kWarpSize * kWarpSize, lane = self - first;
  Warp& warp = m.warps[self / kWarpSize];
  std::memcpy(warp.in + lane * kSlotBytes, in, in_bytes);
  if (++warp.arrived < kWarpSize) {
    Wait(State::kAtWarpOperation, what);
  } else {
    combine(warp.in, warp.out);
    warp.arrived = 0;
    for (unsigned i = first; i < first + kWarpSize; ++i) {
      if (i == self) continue;
      if (m.fibers[i].state != State::kAtWarpOperation || m.fibers[i].where != what)
        Fail("lanes of a warp meet in different operations");
      m.fibers[i].state = State::kReady;
    }
  }
  // Safe without a second meeting: out changes only once all 32 lanes came back for more.
  std::memcpy(out, warp.out + lane * kSlotBytes, out_bytes);
}

bool Run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || shared_bytes > kMaxSharedBytes) return false;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return false;
  if (threads % kWarpSize || shared_bytes % 16)
    Fail("blocks must be whole warps, shared memory whole vectors");
  Machine& m = machine();
  m.body = &body;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), m.random);
  g_place.grid_dim = grid;
  g_place.block_dim = block;
  for (uint64_t b : order) {
    g_place.block_idx = {static_cast<unsigned>(b % grid.x),
                         static_cast<unsigned>(b / grid.x % grid.y),
                         static_cast<unsigned>(b / grid.x / grid.y)};
    m.shared.Reset(shared_bytes, m.random);
    RunBlock(m, block);
  }
  return true;
}

}  // namespace bitnet_emulation
