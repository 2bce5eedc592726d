// One kernel: jitattn_spec.h and ENTRY say which. Made with g++ by tests/support/emulator.py.
#include <immintrin.h>

#include "cuda.h"
#include ENTRY

namespace {

template <class Params>
void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}

}  // namespace

extern "C" void emulate(const void* params, unsigned num_ctas, int num_threads, int smem_bytes,
                        const emulator::Options* options) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // subnormal numbers are 0, as with -ftz=true
  auto& cta = emulator::cta;
  cta.options = *options;
  cta.smem_bytes = smem_bytes;
  cta.params = params;
  cta.body = [](const void* given) { call(KERNEL, given); };
  for (cta.idx = 0; cta.idx < num_ctas; ++cta.idx) {
    // What is not written is NaN in every dtype.
    std::memset(jitattn::s_storage, 0xff, emulator::kLargestShared);
    emulator::run_cta(num_threads);
  }
  _mm_setcsr(before);
}
