#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#include <immintrin.h>

#include "step.h"
#define STEP step_avx512
#define PRODUCT product_avx512
#define WITH_AVX512
#include "all.inc"
#endif
