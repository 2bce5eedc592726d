// Memory checker of emulated kernels: the compiler's race-detection instrumentation calls the
// functions of this file at each access. It reports accesses outside the tensors of the launch, and
// races in shared memory: two threads, or a thread and a bulk copy, access the same bytes, at least one
// writes, and no barrier orders the two. This file itself is compiled without instrumentation.
#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <cstdarg>
#include <set>
#include <string>

#include "cuda.h"

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));  // bounds of this library
extern char _end __attribute__((visibility("hidden")));
}

namespace emulator {
namespace {

struct Region {
  uintptr_t begin;
  uintptr_t end;

  bool holds(uintptr_t address, int bytes) const {
    return address >= begin && address + bytes <= end;
  }
};

// An access: of a thread or of an agent, in one of its epochs.
struct Moment {
  uint32_t run;  // CTAs run before
  uint32_t epoch;
  int actor;
};

// The last write to a granule of shared memory. The last reads of each warp lie in `reads`.
struct Touched {
  Moment write;
  bool is_atomic;
};

constexpr uintptr_t kGranule = 2;  // bytes tracked together
constexpr size_t kMostArrays = 64 * 1024;
constexpr int kMostReports = 10;
constexpr int kMostFrames = 24;

std::vector<Region> tensors;  // in ascending order
Region latest;                // tensor of the last access
std::vector<Region> arrays;   // static shared arrays of kernels
std::vector<uint64_t> begun;  // the CTA in which each was filled with NaN
std::vector<Touched> touched;
std::vector<Moment> reads;  // [granules, warps]
std::set<std::string> found;
std::string reports;

const Clock& clock_of_actor() {
  return cta.agent_clock != nullptr ? *cta.agent_clock : self().clock;
}

Moment now() {
  const int actor = cta.agent_clock != nullptr ? cta.agent : cta.current;
  return {static_cast<uint32_t>(cta.runs), clock_of_actor().epochs[actor], actor};
}

// Whether another actor did `before`, and nothing orders it before the access that is made now.
bool is_race(const Moment& before, const Moment& after) {
  if (before.run != after.run || before.actor == after.actor) return false;
  return clock_of_actor().epochs[before.actor] < before.epoch;
}

// Returns the current call stack as arguments of addr2line, innermost first.
std::string calls() {
  void* frames[kMostFrames];
  const int count = backtrace(frames, kMostFrames);
  Dl_info own, info;
  dladdr(reinterpret_cast<void*>(&calls), &own);
  std::string codes = std::string("'") + own.dli_fname + "'";
  for (int i = 0; i < count; ++i) {
    if (dladdr(frames[i], &info) == 0 || info.dli_fbase != own.dli_fbase) continue;
    char code[32];
    std::snprintf(code, sizeof(code), " %#lx",
                  static_cast<char*>(frames[i]) - static_cast<char*>(own.dli_fbase) - 1);
    codes += code;
  }
  return codes;
}

std::string lines_of(const std::string& calls) {
  std::string lines;
  FILE* told = popen(("addr2line -sfipCe " + calls + " 2>/dev/null").c_str(), "r");
  if (told == nullptr) return lines;
  char line[1024];
  while (std::fgets(line, sizeof(line), told)) {
    const std::string text = line;
    if (text.find(".cu") != std::string::npos) lines += "    " + text;
  }
  pclose(told);
  return lines;
}

// Reports each place once.
void report(const char* what, const char* format, ...) {
  if (found.size() >= kMostReports) return;
  const std::string place = calls();
  if (!found.insert(what + place).second) return;
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  reports += std::string(what) + ": " + text + "\n" + lines_of(place);
}

void check_shared(size_t offset, int bytes, Access access) {
  const Moment moment = now();
  const size_t num_warps = cta.warps.size();
  if (touched.empty()) {
    touched.resize((cta.smem_bytes + kMostArrays) / kGranule);
    reads.resize(touched.size() * num_warps);
  }
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    Touched& last = touched[i];
    auto meets = [&](const Moment& other, const char* how) {
      if (!is_race(other, moment)) return;
      report("race", "byte %zu of shared memory: thread %d %s what thread %d had %s, CTA %u",
             i * kGranule, moment.actor, access == Access::kRead ? "reads" : "writes", other.actor,
             how, cta.idx);
    };
    if (access != Access::kAtomic || !last.is_atomic) meets(last.write, "written");
    if (access == Access::kRead) {
      reads[i * num_warps + moment.actor / kWarpSize] = moment;  // agents only write
      continue;
    }
    for (size_t warp = 0; warp < num_warps; ++warp) meets(reads[i * num_warps + warp], "read");
    last.write = moment;
    last.is_atomic = access == Access::kAtomic;
  }
}

void check(const void* pointer, int bytes, Access access) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(cta.stacks[cta.current]);
  if (cta.agent_clock == nullptr && address - stack < kStackBytes) return;
  const auto shared = reinterpret_cast<uintptr_t>(jitattn::s_storage);
  if (address - shared < kLargestShared) {
    if (address + bytes > shared + cta.smem_bytes) {
      report("outside", "%d bytes at %zu of %d of shared memory", bytes, address - shared,
             cta.smem_bytes);
    }
    return check_shared(address - shared, bytes, access);
  }
  size_t offset = cta.smem_bytes;
  for (const Region& array : arrays) {
    if (array.holds(address, bytes)) {
      return check_shared(offset + address - array.begin, bytes, access);
    }
    offset += (array.end - array.begin + kGranule - 1) / kGranule * kGranule;
  }
  const Region image = {reinterpret_cast<uintptr_t>(&__ehdr_start),
                        reinterpret_cast<uintptr_t>(&_end)};
  if (access == Access::kRead && image.holds(address, bytes)) return;  // constants
  if (latest.holds(address, bytes)) return;
  auto next = std::upper_bound(tensors.begin(), tensors.end(), address,
                               [](uintptr_t value, const Region& r) { return value < r.begin; });
  if (next != tensors.begin() && (next - 1)->holds(address, bytes)) {
    latest = *(next - 1);
    return;
  }
  long before = -1, behind = -1;
  if (next != tensors.end()) before = next->begin - address;
  if (next != tensors.begin()) behind = address - (next - 1)->end;
  const char* how = access == Access::kRead ? "read" : "written";
  report("outside",
         "%d bytes are %s, %ld behind the end of a tensor, %ld before the begin of the next; "
         "thread %d, CTA %u",
         bytes, how, behind, before, cta.current, cta.idx);
  if (access != Access::kRead) {  // would destroy the memory there
    std::fputs(reports.c_str(), stderr);
    fail("a kernel writes to memory of no tensor");
  }
}

}  // namespace

void watch(const void* address, int bytes, Access access) { check(address, bytes, access); }

SharedArray::SharedArray(void* begin, size_t bytes) {
  const AtWork at_work;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  size_t i = 0;
  while (i < arrays.size() && arrays[i].begin != address) ++i;
  if (i == arrays.size()) {
    arrays.push_back({address, address + bytes});
    begun.push_back(0);
  }
  if (begun[i] == cta.runs) return;
  begun[i] = cta.runs;
  std::memset(begin, 0xff, bytes);
}

}  // namespace emulator

// Sets the memory of all tensors before a launch, as pairs of begin and end addresses.
extern "C" void emulate_with(const uintptr_t* pairs, int count) {
  auto& tensors = emulator::tensors;
  tensors.clear();
  emulator::latest = {};
  for (int i = 0; i < count; ++i) tensors.push_back({pairs[2 * i], pairs[2 * i + 1]});
  emulator::found.clear();
  emulator::reports.clear();
}

// Returns the reports after a launch.
extern "C" const char* emulate_found() {
  std::vector<emulator::Touched>().swap(emulator::touched);  // some MB per kernel
  std::vector<emulator::Moment>().swap(emulator::reads);
  return emulator::reports.c_str();
}

// ---- Functions that the instrumentation calls
#define ACCESS(name, bytes, access)                            \
  extern "C" void __tsan_##name(const void* address) {         \
    if (emulator::is_at_work) return;                          \
    emulator::check(address, bytes, emulator::Access::access); \
  }
#define ACCESSES(bytes)                         \
  ACCESS(read##bytes, bytes, kRead)             \
  ACCESS(write##bytes, bytes, kWrite)           \
  ACCESS(unaligned_read##bytes, bytes, kRead)   \
  ACCESS(unaligned_write##bytes, bytes, kWrite) \
  ACCESS(volatile_read##bytes, bytes, kRead)    \
  ACCESS(volatile_write##bytes, bytes, kWrite)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(const void* address, long bytes) {
  if (emulator::is_at_work) return;
  emulator::check(address, bytes, emulator::Access::kRead);
}
extern "C" void __tsan_write_range(const void* address, long bytes) {
  if (emulator::is_at_work) return;
  emulator::check(address, bytes, emulator::Access::kWrite);
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
