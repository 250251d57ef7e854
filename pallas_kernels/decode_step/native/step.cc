// What XLA calls.
#include <algorithm>
#include <thread>

#include "drafter.h"
#include "select.h"
#include "target.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using IntArray = ffi::Buffer<ffi::S32>;
using FloatArray = ffi::Buffer<ffi::F32>;
using ByteArray = ffi::Buffer<ffi::U8>;
using IntSpan = ffi::Span<const int32_t>;
using FloatSpan = ffi::Span<const float>;

template <class Struct, class Span>
Struct read(Span span) {
  Struct out;
  std::memcpy(&out, span.begin(), sizeof out);
  return out;
}

// How many of XLA's threads have a core: it has one for each device, and of those more may be simulated. Threads that
// wait for rows of others who wait for their core made a step ten times slower.
int cores(const ffi::ThreadPool& pool) {
  static const int known = (int)std::thread::hardware_concurrency();  // which opens a file: 10 us
  return known ? std::min(known, (int)pool.num_threads()) : (int)pool.num_threads();
}

Weights weights_in(const ByteArray& bytes, const IntArray& directory) {
  return {bytes.typed_data(), bytes.size_bytes(), directory.typed_data()};
}

// Runs a table on XLA's threads; `threads` of 0 are all that have a core.
template <class Work>
void run(ffi::ThreadPool pool, const IntArray& table, Work work, int threads, int delays) {
  const int rows = (int)table.dimensions()[0];
  auto round = std::make_shared<Round<Work>>((const Row*)table.typed_data(), rows, std::move(work), delays);
  const int helpers = (threads ? threads : cores(pool)) - 1;
  const int core = this_core();
  for (int i = 0; i < helpers; i++) pool.Schedule([round, core] { leave_core(core), round->help(); });
  round->help();
  round->finish();
}

// XLA has to give a donated array back in its place. Where it did not, its content is copied.
float* in_place(const FloatArray& given, ffi::Result<FloatArray>& result) {
  if (result->typed_data() != given.typed_data())
    std::memcpy(result->typed_data(), given.typed_data(), given.size_bytes());
  return result->typed_data();
}

ffi::Error step(ffi::ThreadPool pool, IntArray table, ByteArray weights, IntArray directory, IntArray tokens,
                FloatArray media, IntArray lengths, IntArray counts, FloatArray global_keys, FloatArray global_values,
                FloatArray sliding_keys, FloatArray sliding_values, ffi::Result<FloatArray> logits,
                ffi::Result<FloatArray> hidden, ffi::Result<FloatArray> aux, ffi::Result<IntArray> expert_counts,
                ffi::Result<IntArray> best, ffi::Result<FloatArray> new_global_keys,
                ffi::Result<FloatArray> new_global_values, ffi::Result<FloatArray> new_sliding_keys,
                ffi::Result<FloatArray> new_sliding_values, ffi::Result<ByteArray> scratch, IntSpan sizes,
                FloatSpan numbers, IntSpan layers, IntSpan aux_layers, int32_t threads, int32_t delays) {
  TargetArrays arrays = {};
  arrays.tokens = tokens.typed_data(), arrays.media = media.typed_data(), arrays.lengths = lengths.typed_data(), arrays.counts = counts.typed_data();
  arrays.global_keys = in_place(global_keys, new_global_keys);
  arrays.global_values = in_place(global_values, new_global_values);
  arrays.sliding_keys = in_place(sliding_keys, new_sliding_keys);
  arrays.sliding_values = in_place(sliding_values, new_sliding_values);
  arrays.logits = logits->typed_data(), arrays.hidden = hidden->typed_data(), arrays.aux = aux->typed_data();
  arrays.expert_counts = expert_counts->typed_data(), arrays.best = best->typed_data();
  arrays.scratch = scratch->typed_data();
  arrays.batch = (int)tokens.dimensions()[0], arrays.steps = (int)tokens.dimensions()[1];
  arrays.shown = (int)logits->dimensions()[1];
  arrays.global_rows = (int)global_values.dimensions()[3], arrays.sliding_rows = (int)sliding_values.dimensions()[3];
  for (int b = 0; b < arrays.batch; b++)
    if (arrays.lengths[b] < 0 || arrays.lengths[b] + std::min(arrays.counts[b], arrays.steps) > arrays.global_rows)
      return ffi::Error::InvalidArgument("a row has more tokens than its cache has room for");
  std::fill_n(arrays.expert_counts, expert_counts->element_count(), 0);
  Target target(read<TargetSizes>(sizes), read<TargetNumbers>(numbers), layers.begin(), aux_layers.begin(),
                (int)aux_layers.size(), weights_in(weights, directory), arrays);
  if (!target.is_idle()) run(pool, table, std::move(target), threads, delays);
  return ffi::Error::Success();
}

DraftModel draft_model(IntSpan sizes, FloatSpan numbers, const IntArray& directory, const ByteArray& weights,
                       float* keys, float* values, const FloatArray& shape) {
  const auto dims = shape.dimensions();  // of the values: [L][B][K][S][V]
  return {read<DrafterSizes>(sizes),
          read<DrafterNumbers>(numbers),
          weights_in(weights, directory),
          {keys, values, (int)dims[3]},
          (int)dims[1]};
}

ffi::Error draft(ffi::ThreadPool pool, IntArray table, ByteArray target_weights, IntArray target_directory,
                 ByteArray weights, IntArray directory, IntArray anchors, IntArray lengths, IntArray text,
                 FloatArray keys, FloatArray values, ffi::Result<IntArray> tokens,
                 ffi::Result<FloatArray> likelihoods, ffi::Result<FloatArray> logits, ffi::Result<ByteArray> scratch,
                 IntSpan sizes, FloatSpan numbers, int32_t threads, int32_t delays) {
  const DraftModel model =
      draft_model(sizes, numbers, directory, weights, keys.typed_data(), values.typed_data(), values);
  const DraftArrays arrays = {anchors.typed_data(), lengths.typed_data(),      text.typed_data(),    logits->typed_data(),
                              tokens->typed_data(), likelihoods->typed_data(), scratch->typed_data()};
  std::fill_n(arrays.tokens, tokens->element_count(), 0);
  std::fill_n(arrays.likelihoods, tokens->element_count(), 0.f);
  run(pool, table, Draft(model, weights_in(target_weights, target_directory), arrays), threads, delays);
  return ffi::Error::Success();
}

ffi::Error context(ffi::ThreadPool pool, IntArray table, ByteArray weights, IntArray directory, FloatArray aux,
                   IntArray lengths, IntArray counts, FloatArray keys, FloatArray values,
                   ffi::Result<FloatArray> new_keys, ffi::Result<FloatArray> new_values, ffi::Result<ByteArray> scratch,
                   IntSpan sizes, FloatSpan numbers, int32_t threads, int32_t delays) {
  const DraftModel model =
      draft_model(sizes, numbers, directory, weights, in_place(keys, new_keys), in_place(values, new_values), values);
  const ContextArrays arrays = {aux.typed_data(),      lengths.typed_data(),     counts.typed_data(),
                                scratch->typed_data(), (int)aux.dimensions()[1], (int)aux.dimensions()[2]};
  Context work(model, arrays);
  if (!work.is_idle()) run(pool, table, std::move(work), threads, delays);
  return ffi::Error::Success();
}

// A unit is a row of probabilities.
struct Select {
  const float *p, *weights, *wanted;
  float* kept;
  int rows, count;

  void operator()(const Row& row) const {
    for (int i = row.first(rows); i < row.last(rows); i++)
      kept[i] = least_kept(p + (size_t)i * count, weights + (size_t)i * count, count, wanted[i]);
  }
};

ffi::Error select_rows(ffi::ThreadPool pool, IntArray table, FloatArray p, FloatArray weights, FloatArray wanted,
                       ffi::Result<FloatArray> kept, int32_t threads, int32_t delays) {
  const auto dims = p.dimensions();  // [rows][C]
  const Select work = {p.typed_data(), weights.typed_data(), wanted.typed_data(), kept->typed_data(), (int)dims[0],
                       (int)dims[1]};
  run(pool, table, work, threads, delays);
  return ffi::Error::Success();
}

// Reads bytes and does nothing else: how fast a step could be.
struct Stream {
  const uint8_t* bytes;
  size_t count;
  uint64_t* sums;  // of each share, so that no compiler leaves the reading out

  void operator()(const Row& row) const {
    const size_t lines = count / 64;
    const size_t first = lines * row.share / row.shares, last = lines * (row.share + 1) / row.shares;
    uint64_t sum[8] = {};
    for (size_t line = first; line < last; line++) {
      uint64_t words[8];
      std::memcpy(words, bytes + 64 * line, 64);
      for (int i = 0; i < 8; i++) sum[i] |= words[i];
    }
    for (uint64_t part : sum) sums[row.share] |= part;
  }
};

ffi::Error stream(ffi::ThreadPool pool, IntArray table, ByteArray weights, ByteArray before,
                  ffi::Result<ByteArray> sums, int64_t count, int32_t threads, int32_t delays) {
  std::fill_n(sums->typed_data(), sums->element_count(), 0);
  run(pool, table, Stream{weights.typed_data(), (size_t)count, (uint64_t*)sums->typed_data()}, threads, delays);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mimo_step, step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntArray>()
                                  .Arg<ByteArray>()
                                  .Arg<IntArray>()  // table, weights
                                  .Arg<IntArray>()
                                  .Arg<FloatArray>()
                                  .Arg<IntArray>()
                                  .Arg<IntArray>()  // tokens, media, lengths, counts
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()  // cache
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<IntArray>()
                                  .Ret<IntArray>()
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()  // cache
                                  .Ret<ByteArray>()
                                  .Attr<IntSpan>("sizes")
                                  .Attr<FloatSpan>("numbers")
                                  .Attr<IntSpan>("layers")
                                  .Attr<IntSpan>("aux_layers")
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("delays"));

extern "C" int64_t mimo_step_scratch(const int32_t* sizes, int tokens, int shown) {
  return (int64_t)Target::scratch_bytes(*(const TargetSizes*)sizes, tokens, shown);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mimo_draft, draft,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntArray>()
                                  .Arg<ByteArray>()
                                  .Arg<IntArray>()
                                  .Arg<ByteArray>()
                                  .Arg<IntArray>()
                                  .Arg<IntArray>()
                                  .Arg<IntArray>()
                                  .Arg<IntArray>()  // anchors, lengths, text
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()  // cache
                                  .Ret<IntArray>()
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<ByteArray>()
                                  .Attr<IntSpan>("sizes")
                                  .Attr<FloatSpan>("numbers")
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("delays"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mimo_context, context,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntArray>()
                                  .Arg<ByteArray>()
                                  .Arg<IntArray>()
                                  .Arg<FloatArray>()
                                  .Arg<IntArray>()
                                  .Arg<IntArray>()  // aux, lengths, counts
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()  // cache
                                  .Ret<FloatArray>()
                                  .Ret<FloatArray>()
                                  .Ret<ByteArray>()
                                  .Attr<IntSpan>("sizes")
                                  .Attr<FloatSpan>("numbers")
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("delays"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mimo_select, select_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntArray>()
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()
                                  .Arg<FloatArray>()  // p, weights, wanted
                                  .Ret<FloatArray>()
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("delays"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mimo_stream, stream,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntArray>()
                                  .Arg<ByteArray>()
                                  .Arg<ByteArray>()
                                  .Ret<ByteArray>()
                                  .Attr<int64_t>("count")
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("delays"));

extern "C" int64_t mimo_draft_scratch(const int32_t* sizes, int batch) {
  return (int64_t)Draft::scratch_bytes(*(const DrafterSizes*)sizes, batch);
}

extern "C" int64_t mimo_context_scratch(const int32_t* sizes, int batch, int steps, int aux_width) {
  return (int64_t)Context::scratch_bytes(*(const DrafterSizes*)sizes, batch, steps, aux_width);
}
