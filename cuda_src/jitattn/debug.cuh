// Device-side assertions, compiled in only with JITATTN_DEBUG_ASSERT=1.
#pragma once

#ifdef JITATTN_DEBUG_ASSERT
#define JITATTN_DEVICE_ASSERT(condition) \
  do {                                   \
    if (!(condition)) __trap();          \
  } while (false)
#else
#define JITATTN_DEVICE_ASSERT(condition)
#endif
