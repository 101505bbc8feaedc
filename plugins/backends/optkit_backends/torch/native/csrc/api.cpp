// The functions that Python calls.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "step.h"

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace {
constexpr int64_t PER_THREAD = (256 + 4 * 120) * TILE;  // what products want of `scratch`; see weights.inc and step.inc

struct Kernels {
  void (*step)(Team*, const Model&, const Step&, const Buffers&, int);
  void (*product)(Team*, const Linear&, const float*, int64_t, float*, const Buffers&);
};

constexpr Kernels KERNELS[] = {
    {step_portable, product_portable},
#if defined(__x86_64__)
    {step_avx2, product_avx2},
    {step_avx512, product_avx512},
#endif
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that begins at a cache line, so that no two threads write one.
class Arena {
 public:
  void begin() { next_ = 0; }

  template <typename T>
  T* take(int64_t count) {
    size_t bytes = (count * sizeof(T) + 64) / 64 * 64;
    if (next_ == parts_.size()) parts_.push_back({nullptr, 0});
    auto& [memory, size] = parts_[next_++];
    if (size < bytes) {
      memory.reset(std::aligned_alloc(64, bytes));
      size = memory ? bytes : 0;
      if (!memory) throw std::bad_alloc();
    }
    return static_cast<T*>(memory.get());
  }

 private:
  std::vector<std::pair<std::unique_ptr<void, Free>, size_t>> parts_;
  size_t next_ = 0;
};

// Of a row of integers: four for a feature, as groups of two take when padded to eight, and a vector to write over.
int64_t integer_width(int64_t features) { return (4 * features + 127) / 64 * 64; }

int64_t groups_of(const Linear& layer) { return layer.in / layer.group; }

// Of a row's rests: three for a step of four features at most.
int64_t rest_width(const Linear& layer) { return 3 * groups_of(layer) * ((layer.group + 3) / 4); }

struct Decoder {
  Model model;
  std::vector<Layer> layers;
  Team* team;
  const Kernels* kernels;
  Arena arena;

  template <typename Size>
  int64_t most(const Size& size) const {
    int64_t found = size(model.head);
    for (const auto& layer : layers)
      for (const auto* one : {&layer.query, &layer.key, &layer.value, &layer.out, &layer.gate, &layer.up, &layer.down})
        found = std::max(found, size(*one));
    return found;
  }

  // Floats of all segments of rows that may share them out: of few tokens, or whose last layer is for few.
  int64_t parts(const Step& step) const {
    int64_t group = model.heads / model.kv_heads, few = std::max<int64_t>(QUERIES / group, 1), total = 0;
    for (int64_t row = 0; row < step.row_count; row++) {
      int64_t count = step.starts[row + 1] - step.starts[row], most = (step.computed[row] + count - 1) / SEGMENT + 1;
      total += model.kv_heads * most * seen_size(std::min(count, few) * group, value_dim(model));
    }
    return total;
  }

  Buffers buffers(const Step& step) {
    int64_t tokens = step.token_count;
    int64_t ffn = 0, group = model.heads / model.kv_heads, wide = model.heads * model.head_dim;
    for (const auto& layer : layers) ffn = std::max(ffn, layer.gate.out);
    int64_t widest = std::max({ffn, wide, model.hidden}), few = model.kv_heads * model.head_dim;
    Buffers b;
    b.integer_width = integer_width(widest), b.sum_width = most(groups_of), b.rest_width = most(rest_width);
    int64_t rows = std::max(QUERIES, group);
    b.scratch_size = 2 * seen_size(rows, value_dim(model)) + rows * (model.head_dim + SEGMENT) + PER_THREAD;
    b.scratch_size = (b.scratch_size + 15) / 16 * 16;
    arena.begin();
    b.hidden = arena.take<float>(tokens * model.hidden);
    b.given = arena.take<float>(tokens * model.hidden);
    b.plain = arena.take<float>(tokens * widest);
    b.integers = arena.take<int8_t>(tokens * b.integer_width);
    b.scales = arena.take<float>(tokens);
    b.zeros = arena.take<int32_t>(tokens);
    b.sums = arena.take<int32_t>(tokens * b.sum_width);
    b.ends = arena.take<int32_t>(tokens * b.sum_width);
    b.rests = arena.take<Rest>(tokens * b.rest_width);
    b.query = arena.take<float>(tokens * wide);
    b.key = arena.take<float>(tokens * few);
    b.value = arena.take<float>(tokens * few);
    b.gate = arena.take<float>(tokens * ffn);
    b.up = arena.take<float>(tokens * ffn);
    b.parts = arena.take<float>(parts(step));
    b.scratch = arena.take<float>(team_size(team) * b.scratch_size);
    return b;
  }
};

struct Call {
  Decoder* decoder;
  const Step* step;
  Buffers buffers;
};

void run(void* given, int thread) {
  auto* call = static_cast<Call*>(given);
  call->decoder->kernels->step(call->decoder->team, call->decoder->model, *call->step, call->buffers, thread);
}

}  // namespace

extern "C" {

// The best instructions that this processor and its operating system have.
Instructions optkit_instructions() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return AVX512_VNNI;
  return AVX2;
#else
  return PORTABLE;
#endif
}

// `instructions` must be no better than the processor's, and those that the weights are packed for.
Decoder* optkit_open(const Model* model, int threads, Instructions instructions) {
  try {
    auto made = std::make_unique<Decoder>();
    made->model = *model;
    made->layers.assign(model->layers, model->layers + model->layer_count);
    made->model.layers = made->layers.data();
    made->kernels = &KERNELS[instructions];
    made->team = team_open(threads);
    return made.release();
  } catch (...) {
    return nullptr;
  }
}

void optkit_close(Decoder* decoder) {
  team_close(decoder->team);
  delete decoder;
}

// out[rows][layer->out] of in[rows][layer->in], by the caller's thread. 0, or 1 where memory is missing.
int optkit_product(const Linear* layer, const float* in, int64_t rows, float* out, Instructions instructions) {
  try {
    Arena arena;
    Buffers b = {};
    b.integer_width = integer_width(layer->in), b.sum_width = groups_of(*layer), b.rest_width = rest_width(*layer);
    b.plain = arena.take<float>(rows * layer->in);
    b.integers = arena.take<int8_t>(rows * b.integer_width);
    b.scales = arena.take<float>(rows);
    b.zeros = arena.take<int32_t>(rows);
    b.sums = arena.take<int32_t>(rows * b.sum_width);
    b.ends = arena.take<int32_t>(rows * b.sum_width);
    b.rests = arena.take<Rest>(rows * b.rest_width);
    b.scratch = arena.take<float>(PER_THREAD);
    Team* team = team_open(1);
    KERNELS[instructions].product(team, *layer, in, rows, out, b);
    team_close(team);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// 0; 1 where memory is missing; 2 for tokens that the vocabulary, blocks that the cache, or places that the step does
// not have.
int optkit_step(Decoder* decoder, const Step* step) {
  auto outside = [](const int32_t* numbers, int64_t count, int64_t end) {
    return std::any_of(numbers, numbers + count, [end](int32_t number) { return number < 0 || number >= end; });
  };
  if (outside(step->tokens, step->token_count, decoder->model.vocabulary) ||
      outside(step->table, step->row_count * step->width, decoder->model.blocks) ||
      outside(step->kept, step->kept_count, step->token_count))
    return 2;
  try {
    Call call = {decoder, step, decoder->buffers(*step)};
    team_run(decoder->team, run, &call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
