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
  self().has_ended = true;
  own_warp().barrier.leave();
  cta.barrier.leave();
  _longjmp(cta.scheduler, 1);
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

void wait_at(Barrier& barrier) {
  const AtWork at_work;
  Thread& thread = self();
  if (++barrier.arrived == barrier.expected) {
    barrier.open();
    return;
  }
  thread.waits_for = &barrier;
  thread.generation = barrier.generation;
  if (_setjmp(thread.state) == 0) _longjmp(cta.scheduler, 1);
}

void synchronize_cta() {
  wait_at(cta.barrier);
  const AtWork at_work;
  ++self().cta_syncs;
}
void synchronize_warp() {
  const AtWork at_work;
  wait_at(own_warp().barrier);
  ++self().warp_syncs;
}

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
    if (!has_run) fail("all threads wait, and nothing will wake them");
  }
}

void release_stacks() {
  for (unsigned char* stack : cta.stacks) munmap(stack, kStackBytes);
  cta.stacks.clear();
}

}  // namespace emulator
