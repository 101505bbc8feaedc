// The AVX-512 instructions that the native kernels name, for processors that have AVX2 alone. Vectors of 512 bits GCC
// takes apart by itself.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(64)));

template <typename Number, typename Vector>
static inline __m512i widened(Vector from) {
  Number numbers[16];
  Ints found;
  __builtin_memcpy(numbers, &from, sizeof numbers);
  for (int i = 0; i < 16; i++) found[i] = numbers[i];
  return (__m512i)found;
}

static inline __m512i load(const void* from) {
  __m512i found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}

static inline __m512i all(int32_t one) { return (__m512i)(one - Ints{}); }

static inline __m512i all_bytes(int one) { return all((one & 255) * 0x01010101); }

static inline __m512i shifted(__m512i what, int bits) { return (__m512i)((Shorts)what >> bits); }

// Sums without saturation of four products of unsigned by signed bytes.
static inline __m512i dot(__m512i sums, __m512i a, __m512i b) {
  uint8_t as[64];
  int8_t bs[64];
  Ints found = (Ints)sums;
  __builtin_memcpy(as, &a, sizeof as), __builtin_memcpy(bs, &b, sizeof bs);
  for (int i = 0; i < 64; i++) found[i / 4] += as[i] * bs[i];
  return (__m512i)found;
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

static inline Floats fused(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

}  // namespace emulated

#undef _mm512_srli_epi16
#define _mm512_cvtepi16_epi32 emulated::widened<int16_t>
#define _mm512_cvtepu8_epi32 emulated::widened<uint8_t>
#define _mm512_cvtepi8_epi32 emulated::widened<int8_t>
#define _mm512_max_ps emulated::larger
#define _mm512_min_ps emulated::smaller
#define _mm512_fmadd_ps emulated::fused
#define _mm512_setzero_si512() __m512i{}
#define _mm512_loadu_si512 emulated::load
#define _mm512_set1_epi32 emulated::all
#define _mm512_set1_epi8 emulated::all_bytes
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_srli_epi16 emulated::shifted
#define _mm512_dpbusd_epi32 emulated::dot
