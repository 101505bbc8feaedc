// What Python hands over: plain structs of pointers and sizes, mirrored in layout.py. Nothing here owns memory.
#pragma once
#include <cstdint>

// A tile is 16 output columns. Weights are packed tile by tile, each tile by input feature, so that a product reads
// them once and in order. Outputs are padded with zero columns to a whole tile.
constexpr int TILE = 16;

enum Storage : int32_t {
  FLOAT32 = 0,  // [tiles][in][16] float
  // For float inputs, `in` padded to even with zeros:
  INT8 = 1,  // [tiles][in / 2][16][2] int8
  INT4 = 2,  // [tiles][in / 2][16] bytes: the even feature plus 8 in the low half, the odd one in the high
  // For int8 inputs, each group padded to whole steps of an integer product (see vectors.inc):
  INT8_STEPS = 3,  // [tiles][steps][16][4] uint8, plus 128
  INT4_STEPS = 4,  // [tiles][steps][16][4] bytes: four features plus 8 in low halves, the next four in high halves
};

enum Rounding : int32_t {
  KEPT = 0,       // the input stays float32
  SYMMETRIC = 1,  // int8 by token
  SHIFTED = 2,    // int8 by token, with a zero point
  FIXED = 3,      // int8 by a scale and zero point of the layer
};

enum Cache : int32_t {
  FLOATS = 0,    // float32
  BFLOATS = 1,   // bfloat16, the upper half of float32
  INTEGERS = 2,  // int8, with a scale for each head
};

enum Gate : int32_t { SILU = 0, GELU_TANH = 1 };

struct Linear {
  const void* weight;
  const float* scale;   // [tiles][groups][16], null for float32
  const float* zero;    // [tiles][groups][16]: zero points, null for symmetric weights
  const int32_t* sums;  // [tiles][groups][16]: of weights less zero points; null if inputs have no zero point
  const float* bias;    // [tiles * 16] or null
  int64_t in, out;      // features, not padded
  int64_t group;        // input features that share a scale; `in` where all do
  int32_t storage;
  int32_t rounding;
  float input_scale;    // of FIXED
  float input_zero;     // of FIXED
};

struct Layer {
  const float* input_norm;      // [hidden]
  const float* attention_norm;  // [hidden] after attention, or null
  const float* ffn_norm;        // [hidden] before the feed-forward part
  const float* output_norm;     // [hidden] after it, or null
  const float* query_norm;      // [head_dim] or null
  const float* key_norm;        // [head_dim] or null
  const float* cosines;         // [max_length][rotary_dim / 2]
  const float* sines;
  void* keys;                   // [kv_heads][blocks][head_dim][BLOCK]
  void* values;                 // [kv_heads][blocks][BLOCK][head_dim, padded to whole tiles]
  const float* key_scale;       // [kv_heads] of int8 caches, or null
  const float* value_scale;
  Linear query, key, value, out, gate, up, down;
  int64_t window;               // last tokens seen; 0 for all
};

struct Model {
  const float* embedding;  // [vocabulary][hidden]
  const float* norm;       // [hidden]
  const Layer* layers;
  Linear head;
  int64_t layer_count, hidden, heads, kv_heads, head_dim, rotary_dim, ffn, vocabulary, blocks;
  float eps, embedding_factor, attention_factor, logit_cap;  // logit_cap: 0 for none
  int32_t gate;
  int32_t cache;
};

// One step: all new tokens on one axis, row after row.
struct Step {
  const int32_t* tokens;    // [tokens]
  const int32_t* starts;    // [rows + 1]: each row's tokens on the axis
  const int32_t* computed;  // [rows]: tokens in the cache before the step
  const int32_t* table;     // [rows][width]: block ids
  const int32_t* kept;      // [kept_count]: places on the axis whose logits are wanted, in order; a row's side by side
  float* logits;            // [kept_count][vocabulary]
  double* seconds;          // [(layer_count * PHASES) + 2], or null: not timed
  int64_t token_count, row_count, width, kept_count;
};

constexpr int BLOCK = 16;  // tokens of a KV block, which is also a tile of scores

// Parts of a layer that are timed, in order; the step ends with the head, and begins with the embedding.
enum Phase { NORM, QKV, ROTARY, ATTENTION, OUT_ROUND, OUT, FFN_NORM, GATE_UP, ACTIVATE, DOWN, PHASES };
