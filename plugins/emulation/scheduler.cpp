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
#include <set>
#include <string>
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
  bool only_check = false;
  std::vector<const char*> barriers;  // reached; string literals, so equal ones may differ in place
  std::string left_out;
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

// Runs the ready lanes of a warp, in random order, each up to where it has to wait; false if none
// was ready.
bool StepWarp(Machine& m, unsigned warp) {
  unsigned ready[kWarpSize], count = 0;
  for (unsigned i = warp * kWarpSize; i < (warp + 1) * kWarpSize; ++i) {
    if (m.fibers[i].state == State::kReady) ready[count++] = i;
  }
  std::shuffle(ready, ready + count, m.random);
  for (unsigned i = 0; i < count; ++i) {
    m.current = ready[i];
    g_place.thread_idx = m.fibers[ready[i]].thread_idx;
    swapcontext(&m.scheduler, &m.fibers[ready[i]].context);
  }
  return count > 0;
}

// Runs all warps up to the next barrier: side by side, a step each, or by chance one after the
// other. Side by side they reach their n-th warp operation together, which hides a race between
// one warp's early step and another's late one; apart, what two warps do in turns is hidden.
void RunToBarrier(Machine& m, std::vector<unsigned>& warps) {
  const bool apart = m.random() & 1;
  for (bool stepped = true; stepped;) {
    stepped = false;
    std::shuffle(warps.begin(), warps.end(), m.random);
    for (unsigned warp : warps) {
      while (StepWarp(m, warp)) {
        stepped = true;
        if (!apart) break;
      }
    }
  }
}

void RunBlock(Machine& m, Dim3 block) {
  const unsigned count = block.x * block.y * block.z;
  StartFibers(m, block);
  std::vector<unsigned> warps(count / kWarpSize);
  std::iota(warps.begin(), warps.end(), 0u);
  const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  for (;;) {
    RunToBarrier(m, warps);
    if (std::all_of(m.fibers.begin(), m.fibers.begin() + count, done)) return;
    OpenBarrier(m, count);
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

void OnlyCheckLaunches(bool only) { machine().only_check = only; }

std::vector<std::string> ReachedBarriers() {
  const std::vector<const char*>& reached = machine().barriers;
  const std::set<std::string> names(reached.begin(), reached.end());
  return {names.begin(), names.end()};
}

void LeaveOutBarrier(const std::string& where) { machine().left_out = where; }

void SyncThreads(const char* where) {
  Machine& m = machine();
  if (std::find(m.barriers.begin(), m.barriers.end(), where) == m.barriers.end())
    m.barriers.push_back(where);
  if (m.left_out != where) Wait(State::kAtBarrier, where);
}

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
  if (m.only_check) return true;
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
