// Thread scheduler of the emulator, compiled once for all kernels.
#include <cuda.h>
#include <sys/mman.h>

namespace emulator {

Cta cta;

namespace {

void carry_out(std::vector<Copy>& copies) {
  const AtWork at_work;
  for (const Copy& copy : copies) {
    watch(copy.to, 16, Access::kWrite);
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.clear();
}

void begin() {
  cta.body(cta.params);
  const AtWork at_work;
  for (const auto& group : self().reduction_groups) {
    if (!group.empty()) fail("a CTA ends before its bulk copies have read shared memory");
  }
  self().has_ended = true;
  own_warp().barrier.leave();
  cta.barrier.leave();
  _longjmp(cta.scheduler, 1);
}

#ifdef WATCHED
constexpr bool kIsWatched = true;
#else
constexpr bool kIsWatched = false;
#endif
// Agents that carry out bulk copies: one for each barrier, behind the threads.
constexpr int kAgents = 64;

// Passes on what this thread has done to those that wait.
void release(Clock& joined) {
  if (!kIsWatched) return;
  Clock& own = self().clock;
  joined.join(own);
  ++own.epochs[cta.current];
}
void acquire(const Clock& opened) {
  if (kIsWatched) self().clock.join(opened);
}

// Runs another thread until the generation of a barrier has passed.
void wait_for(const Barrier& barrier, uint64_t generation) {
  Thread& thread = self();
  thread.waits_for = &barrier;
  thread.generation = generation;
  if (_setjmp(thread.state) == 0) _longjmp(cta.scheduler, 1);
}

MBarrier& mbarrier_at(uint32_t addr) {
  const auto found = cta.mbarriers.find(addr);
  if (found == cta.mbarriers.end()) fail("no barrier was initialised at this address");
  return found->second;
}

// Copies finish in any order.
void carry_out_newest_bulk_copy() {
  auto copy = std::move(cta.bulk_copies.back());
  cta.bulk_copies.pop_back();
  copy();
}

bool can_run(const Thread& thread) {
  return !thread.has_ended &&
         (thread.waits_for == nullptr || thread.waits_for->generation != thread.generation);
}

void resume(int idx) {
  Thread& thread = cta.threads[idx];
  cta.current = idx;
  thread.waits_for = nullptr;
  if (_setjmp(cta.scheduler) != 0) return;
  if (thread.has_begun) _longjmp(thread.state, 1);
  thread.has_begun = true;
  getcontext(&thread.first);
  thread.first.uc_stack.ss_sp = cta.stacks[idx];
  thread.first.uc_stack.ss_size = kStackBytes;
  thread.first.uc_link = nullptr;
  makecontext(&thread.first, begin, 0);
  setcontext(&thread.first);
}

}  // namespace

void wait_at(Barrier& barrier, bool orders) {
  const AtWork at_work;
  const uint64_t generation = barrier.generation;
  arrive_at(barrier, orders);
  if (barrier.generation == generation) wait_for(barrier, generation);
  if (orders) acquire(barrier.opened);
}

void arrive_at(Barrier& barrier, bool orders) {
  const AtWork at_work;
  if (orders) release(barrier.joined);
  if (++barrier.arrived == barrier.expected) barrier.open();
}

Barrier& named_barrier(int idx, int num_threads) {
  if (idx < 0 || idx >= 16) fail("a CTA has 16 barriers");
  Barrier& barrier = cta.named[idx];
  if (barrier.arrived > 0 && barrier.expected != num_threads) {
    fail("threads disagree on how many a barrier is for");
  }
  barrier.expected = num_threads;
  return barrier;
}

void init_mbarrier(uint32_t addr, int num_arrivals) {
  const AtWork at_work;
  const int agent = static_cast<int>(cta.threads.size() + cta.mbarriers.size());
  if (cta.mbarriers.size() >= kAgents) fail("too many barriers");
  cta.mbarriers[addr] = {num_arrivals, num_arrivals, 0, agent, {}};
}

void arrive_at_mbarrier(uint32_t addr, uint32_t num_bytes) {
  const AtWork at_work;
  MBarrier& barrier = mbarrier_at(addr);
  if (barrier.pending == 0) fail("more threads arrive at a barrier than it expects");
  release(barrier.phase.joined);
  --barrier.pending;
  barrier.pending_bytes += num_bytes;
  barrier.open_if_complete();
}

void wait_at_mbarrier(uint32_t addr, uint32_t parity) {
  const AtWork at_work;
  const Barrier& phase = mbarrier_at(addr).phase;
  if (phase.generation % 2 == parity) wait_for(phase, phase.generation);
  acquire(phase.opened);
}

void start_bulk_copy(uint32_t addr, uint32_t num_bytes, std::function<void()> copy) {
  const AtWork at_work;
  Clock issued;
  release(issued);
  cta.bulk_copies.push_back([=]() mutable {
    const AtWork at_work;
    MBarrier& barrier = mbarrier_at(addr);
    if (kIsWatched) {
      // The agent's accesses follow what its issuer knew, and precede the end of the phase.
      issued.epochs[barrier.agent] = ++cta.agent_epochs[barrier.agent - cta.threads.size()];
      cta.agent_clock = &issued;
      cta.agent = barrier.agent;
    }
    copy();
    cta.agent_clock = nullptr;
    barrier.phase.joined.join(issued);
    barrier.pending_bytes -= num_bytes;
    barrier.open_if_complete();
  });
  if (cta.options.late_copies) return;
  carry_out_newest_bulk_copy();
}

void start_product(std::function<void()> product) {
  const AtWork at_work;
  auto& products = self().products;
  products.push_back(std::move(product));
  if (cta.options.late_copies) return;
  products.back()();
  products.pop_back();
}

void commit_products() {
  const AtWork at_work;
  Thread& thread = self();
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}

void wait_for_products(size_t pending) {
  const AtWork at_work;
  auto& groups = self().product_groups;
  while (groups.size() > pending) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}

void start_reduction(std::function<void()> reduction) {
  const AtWork at_work;
  if (!cta.options.late_copies) return reduction();
  self().reductions.push_back(std::move(reduction));
}

void commit_reductions() {
  const AtWork at_work;
  Thread& thread = self();
  thread.reduction_groups.push_back(std::move(thread.reductions));
  thread.reductions.clear();
}

void wait_for_reductions(size_t pending) {
  const AtWork at_work;
  auto& groups = self().reduction_groups;
  while (groups.size() > pending) {
    for (auto& reduction : groups.front()) reduction();
    groups.erase(groups.begin());
  }
}

void synchronize_cta() { wait_at(cta.barrier); }
void synchronize_warp() { wait_at(own_warp().barrier); }
void synchronize_warp_alone() { wait_at(own_warp().barrier, false); }

void start_copy(const Copy& copy) {
  const AtWork at_work;
  auto& copies = self().copies;
  copies.push_back(copy);
  if (!cta.options.late_copies) carry_out(copies);
}

void commit() {
  const AtWork at_work;
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void wait_for_copies(size_t pending) {
  const AtWork at_work;
  auto& groups = self().groups;
  while (groups.size() > pending) {
    carry_out(groups.front());
    groups.erase(groups.begin());
  }
}

void run_cta(int num_threads) {
  ++cta.runs;
  while (static_cast<int>(cta.stacks.size()) < num_threads) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    cta.stacks.push_back(static_cast<unsigned char*>(stack));
  }
  cta.threads.assign(num_threads, Thread{});
  cta.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, Warp{});
  cta.barrier = {num_threads, 0, 0};
  for (Barrier& barrier : cta.named) barrier = {};
  cta.mbarriers.clear();
  cta.bulk_copies.clear();
  cta.agent_epochs.assign(kAgents, 0);
  if (kIsWatched) {
    for (int i = 0; i < num_threads; ++i) {
      cta.threads[i].clock.epochs.assign(num_threads + kAgents, 0);
      cta.threads[i].clock.epochs[i] = 1;
    }
  }
  for (int i = 0; i < num_threads; ++i) ++cta.warps[i / kWarpSize].barrier.expected;
  for (int left = num_threads; left > 0;) {
    bool has_run = false;
    for (int i = 0; i < num_threads; ++i) {
      const int idx = cta.options.last_to_first ? num_threads - 1 - i : i;
      if (!can_run(cta.threads[idx])) continue;
      has_run = true;
      resume(idx);
      if (cta.threads[idx].has_ended) --left;
    }
    if (has_run) continue;
    if (cta.bulk_copies.empty()) fail("all threads wait, and nothing will wake them");
    carry_out_newest_bulk_copy();
  }
  while (!cta.bulk_copies.empty()) carry_out_newest_bulk_copy();
}

void release_stacks() {
  for (unsigned char* stack : cta.stacks) munmap(stack, kStackBytes);
  cta.stacks.clear();
}

}  // namespace emulator
