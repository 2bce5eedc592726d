// Device-side checks, compiled in by JITATTN_DEBUG_ASSERT=1 only.
#pragma once

#ifdef JITATTN_DEBUG_ASSERT
#define JITATTN_DEVICE_ASSERT(condition) \
  do {                                   \
    if (!(condition)) __trap();          \
  } while (false)
#else
#define JITATTN_DEVICE_ASSERT(condition)
#endif
