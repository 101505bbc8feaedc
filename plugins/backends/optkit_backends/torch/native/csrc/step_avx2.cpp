#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "step.h"
#define STEP step_avx2
#define PRODUCT product_avx2
#define WITH_AVX2
#include "all.inc"
#endif
