// What a step works in, and the step itself, once for each instruction set.
#pragma once
#include "shapes.h"
#include "team.h"

// What is left to multiply of four inputs that were too large for one step of products.
struct Rest {
  int32_t step;  // of the group
  int8_t input[4];
};

// Room for one step of so many tokens; nothing in it outlives the step but the hidden state.
struct Buffers {
  float* hidden;      // [tokens][hidden]
  float* given;       // [tokens][hidden]: what a part of a layer gave
  float* plain;       // [tokens][widest input]
  int8_t* integers;   // [tokens][integer_width]: rounded
  float* scales;      // [tokens]
  int32_t* zeros;     // [tokens]: zero points
  int32_t* sums;      // [tokens][sum_width]: of each group of integers
  int32_t* ends;      // [tokens][sum_width]: of each group's rests
  Rest* rests;        // [tokens][rest_width]
  float *query, *key, *value, *gate, *up;
  float* parts;       // what rows that share segments have seen of each, see attention.inc
  float* scratch;     // [threads][scratch_size]
  int64_t integer_width, sum_width, rest_width, scratch_size;
};

constexpr int64_t QUERIES = 24;   // query rows that attend together, where a group is not larger
constexpr int64_t SEGMENT = 256;  // positions that they see before their scores are forgotten

static inline int64_t value_dim(const Model& m) { return (m.head_dim + TILE - 1) / TILE * TILE; }
static inline int64_t seen_size(int64_t rows, int64_t padded) { return (rows * (padded + 2) + 15) / 16 * 16; }

double seconds_now();

// What a processor has, each with all before it.
enum Instructions : int { PORTABLE = 0, AVX2 = 1, AVX512_VNNI = 2 };

// A step, called by every thread of the team; and one product, by a team of one.
void step_portable(Team*, const Model&, const Step&, const Buffers&, int thread);
void product_portable(Team*, const Linear&, const float* in, int64_t rows, float* out, const Buffers&);
#if defined(__x86_64__)
void step_avx2(Team*, const Model&, const Step&, const Buffers&, int thread);
void product_avx2(Team*, const Linear&, const float* in, int64_t rows, float* out, const Buffers&);
void step_avx512(Team*, const Model&, const Step&, const Buffers&, int thread);
void product_avx512(Team*, const Linear&, const float* in, int64_t rows, float* out, const Buffers&);
#endif
