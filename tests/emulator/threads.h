// Emulates the threads of one CTA as coroutines on one CPU thread: each has a stack, and runs until
// it waits for others. Runs are therefore deterministic, and deadlocks are detected.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 512 * 1024;
constexpr size_t kLargestShared = 256 * 1024;

// Scheduling options of a CTA. A correct kernel gives the same result with any of them.
struct Options {
  int32_t late_copies;    // copies and products: 1 as late as waits allow, 0 immediately
  int32_t last_to_first;  // threads run from the last warp to the first
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

// Marks code of the emulator itself, whose accesses watch.cpp ignores.
#ifdef WATCHED
inline bool is_at_work = true;
struct AtWork {
  bool before;
  __attribute__((no_sanitize("thread"))) AtWork() : before(is_at_work) { is_at_work = true; }
  __attribute__((no_sanitize("thread"))) ~AtWork() { is_at_work = before; }
};
#else
struct AtWork {
  AtWork() {}
};
#endif

// What a thread knows of all threads, and of the agents that carry out bulk copies: the epoch up to
// which their accesses to memory precede its own next one. (Mattern, Virtual Time and Global States
// of Distributed Systems, 1989.) Empty unless accesses are watched.
struct Clock {
  std::vector<uint32_t> epochs;

  void join(const Clock& other) {
    if (epochs.size() < other.epochs.size()) epochs.resize(other.epochs.size());
    for (size_t i = 0; i < other.epochs.size(); ++i) {
      epochs[i] = epochs[i] < other.epochs[i] ? other.epochs[i] : epochs[i];
    }
  }
};

// A barrier for a set of threads.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
  Clock joined = {};  // of those that have arrived
  Clock opened = {};  // of those that the last generation waited for

  void open() {
    arrived = 0;
    ++generation;
    opened = joined;
  }
  // Removes a thread that has exited: the others no longer wait for it.
  void leave() {
    if (--expected > 0 && arrived == expected) open();
  }
};

// A barrier in shared memory, whose phases also wait for the bytes of bulk copies.
struct MBarrier {
  int expected = 0;
  int pending = 0;
  int64_t pending_bytes = 0;
  int agent = 0;  // that carries out its copies
  Barrier phase;  // its generation counts the phases that are over

  void open_if_complete() {
    if (pending > 0 || pending_bytes != 0) return;
    pending = expected;
    phase.open();
  }
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // of 16; the rest is filled with 0
};

// The value that a lane passes to the others of its warp.
struct alignas(16) Slot {
  unsigned char bytes[48];
};

struct Warp {
  Barrier barrier;
  Slot slots[2][kWarpSize];
  int parity[kWarpSize];  // of each lane's next exchange
};

struct Thread {
  ucontext_t first;
  jmp_buf state;
  bool has_begun;
  bool has_ended;
  const Barrier* waits_for;
  uint64_t generation;
  Clock clock;
  std::vector<Copy> copies;               // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<std::function<void()>> products;
  bool drops_products;  // the results of those that are started
  std::vector<std::vector<std::function<void()>>> product_groups;
  std::vector<std::function<void()>> reductions;
  std::vector<std::vector<std::function<void()>>> reduction_groups;
};

struct Cta {
  Options options;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  Barrier named[16];
  std::map<uint32_t, MBarrier> mbarriers;          // by address in shared memory
  std::vector<std::function<void()>> bulk_copies;  // not carried out yet
  std::vector<unsigned char*> stacks;
  jmp_buf scheduler;
  int current = 0;
  const Clock* agent_clock = nullptr;  // while an agent carries out a copy
  int agent = 0;
  std::vector<uint32_t> agent_epochs;
  unsigned idx = 0;
  unsigned count = 0;  // CTAs of the grid
  int smem_bytes = 0;
  uint64_t runs = 0;  // CTAs run so far
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
};

extern Cta cta;

inline Thread& self() { return cta.threads[cta.current]; }
inline Warp& own_warp() { return cta.warps[cta.current / kWarpSize]; }

// Returns once all threads that the barrier expects have arrived. orders: accesses to memory before
// it precede those behind.
void wait_at(Barrier& barrier, bool orders = true);
void arrive_at(Barrier& barrier, bool orders = true);
// Returns a barrier of the CTA for so many of its threads.
Barrier& named_barrier(int idx, int num_threads);

void init_mbarrier(uint32_t addr, int num_arrivals);
// Arrives, and adds bytes that the phase waits for.
void arrive_at_mbarrier(uint32_t addr, uint32_t num_bytes);
// Waits until the phase of a parity is over.
void wait_at_mbarrier(uint32_t addr, uint32_t parity);

// Exchanges `mine` among all lanes; the returned slots are valid until the exchange after the next.
template <class T>
const Slot* exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const AtWork at_work;
  Warp& warp = own_warp();
  const int lane = cta.current % kWarpSize;
  int& parity = warp.parity[lane];
  Slot* slots = warp.slots[parity];
  parity ^= 1;
  std::memcpy(slots[lane].bytes, &mine, sizeof(T));
  wait_at(warp.barrier, false);
  return slots;
}

template <class T>
T shown(const Slot* slots, int lane) {
  const AtWork at_work;
  T value;
  std::memcpy(&value, slots[lane].bytes, sizeof(T));
  return value;
}

// Kind of a memory access. Atomics do not race with each other.
enum class Access { kRead, kWrite, kAtomic };

// Records an access that the compiler's instrumentation does not report to watch.cpp.
#ifdef WATCHED
void watch(const void* address, int bytes, Access access);
#else
inline void watch(const void*, int, Access) {}
#endif

// Waits at the barrier of the CTA, or of a warp alone, and orders the accesses around it.
void synchronize_cta();
void synchronize_warp();
// Waits for the lanes of a warp, and orders nothing.
void synchronize_warp_alone();

// cp.async, its commit, and the wait until at most so many groups are pending.
void start_copy(const Copy& copy);
void commit();
void wait_for_copies(size_t pending);

// Bulk copies, which tell a barrier of their bytes.
void start_bulk_copy(uint32_t addr, uint32_t num_bytes, std::function<void()> copy);

// Products of a warpgroup, their commit, and the wait until at most so many groups are pending.
void start_product(std::function<void()> product);
void commit_products();
void wait_for_products(size_t pending);

// Bulk copies from shared memory that add to global memory, their commit, and the wait until at most
// so many groups of this thread are pending.
void start_reduction(std::function<void()> reduction);
void commit_reductions();
void wait_for_reductions(size_t pending);

// Runs the current CTA to its end.
void run_cta(int num_threads);
// Frees the stacks: a test run loads hundreds of kernels, each with its own.
void release_stacks();

}  // namespace emulator
