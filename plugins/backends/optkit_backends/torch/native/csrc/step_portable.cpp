#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "step.h"
#define STEP step_portable
#define PRODUCT product_portable
#include "all.inc"
