// Entry point of one emulated kernel, which jitattn_spec.h and ENTRY select. Built with g++ by
// tests/support/emulator.py.
#include <cuda.h>  // angle brackets find the precompiled header

#include ENTRY

namespace {

template <class Params>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Params), const void* params) {
  alignas(Params) unsigned char own[sizeof(Params)];
  std::memcpy(own, params, sizeof(Params));
#ifdef WATCHED
  emulator::is_at_work = false;
#endif
  kernel(*reinterpret_cast<const Params*>(own));
}

// A kernel with tensor maps, which lie before its parameters.
template <class Maps, class Params>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Maps, Params), const void* given) {
  alignas(Maps) unsigned char maps[sizeof(Maps)];
  alignas(Params) unsigned char params[sizeof(Params)];
  std::memcpy(maps, given, sizeof(Maps));
  std::memcpy(params, static_cast<const unsigned char*>(given) + sizeof(Maps), sizeof(Params));
#ifdef WATCHED
  emulator::is_at_work = false;
#endif
  kernel(*reinterpret_cast<const Maps*>(maps), *reinterpret_cast<const Params*>(params));
}

}  // namespace

extern "C" void emulate(const void* params, unsigned num_ctas, int num_threads, int smem_bytes,
                        const emulator::Options* options) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush subnormal numbers to 0, as with -ftz=true
  auto& cta = emulator::cta;
  cta.options = *options;
  cta.smem_bytes = smem_bytes;
  cta.count = num_ctas;
  cta.params = params;
  cta.body = [](const void* given) { call(KERNEL, given); };
  for (cta.idx = 0; cta.idx < num_ctas; ++cta.idx) {
    // Memory that is not written is NaN in every dtype.
    std::memset(jitattn::s_storage, 0xff, emulator::kLargestShared);
    emulator::run_cta(num_threads);
  }
  emulator::release_stacks();
  _mm_setcsr(before);
}
