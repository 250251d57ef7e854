// Runs a dumped round on threads of its own, without XLA, so that the thread sanitizer sees all of it. The same logits
// have to come out on one thread and on several, with rows delayed at random.
#include <cstdio>
#include <string>
#include <thread>

#include "drafter.h"
#include "target.h"

using Array = std::vector<uint8_t>;

// Arrays in a file, each after its size in bytes.
static std::vector<Array> read_arrays(const char* path) {
  std::vector<Array> arrays;
  FILE* file = std::fopen(path, "rb");
  int64_t size;
  while (std::fread(&size, 8, 1, file) == 1) {
    arrays.emplace_back(size);
    if (std::fread(arrays.back().data(), 1, size, file) != (size_t)size) std::abort();
  }
  std::fclose(file);
  return arrays;
}

template <class T>
static T* as(Array& array) {
  return (T*)array.data();
}

template <class Work>
static void run(Array& table, Work work, int threads, int delays) {
  auto round =
      std::make_shared<Round<Work>>(as<Row>(table), (int)(table.size() / sizeof(Row)), std::move(work), delays);
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; i++) helpers.emplace_back([round] { round->help(); });
  round->help();
  round->finish();
  for (std::thread& helper : helpers) helper.join();
}

// sizes, numbers, layers, aux layers, table, weights, directory, tokens, lengths, counts, caches (4), shape.
static std::vector<float> step(std::vector<Array> a, int threads, int delays) {
  const int32_t* shape = as<int32_t>(a[14]);  // batch, steps, global rows, sliding rows, expert layers
  const TargetSizes& sizes = *as<TargetSizes>(a[0]);
  const int batch = shape[0], steps = shape[1], aux = (int)a[3].size() / 4;
  std::vector<float> logits(batch * steps * sizes.vocab), hidden(batch * steps * sizes.width),
      taps(hidden.size() * aux);
  std::vector<int32_t> counts(shape[4] * sizes.experts), best(batch * steps);
  Array scratch(Target::scratch_bytes(sizes, batch * steps, batch * steps));
  const TargetArrays arrays = {as<int32_t>(a[7]),
                               as<int32_t>(a[8]),
                               as<int32_t>(a[9]),
                               nullptr,  // no media
                               as<float>(a[10]),
                               as<float>(a[11]),
                               as<float>(a[12]),
                               as<float>(a[13]),
                               logits.data(),
                               hidden.data(),
                               taps.data(),
                               counts.data(),
                               best.data(),
                               scratch.data(),
                               batch,
                               steps,
                               steps,
                               shape[2],
                               shape[3]};
  const Weights weights = {a[5].data(), a[5].size(), as<int32_t>(a[6])};
  run(a[4], Target(sizes, *as<TargetNumbers>(a[1]), as<int32_t>(a[2]), as<int32_t>(a[3]), aux, weights, arrays),
      threads, delays);
  return logits;
}

// sizes, numbers, table, target's weights, its directory, weights, directory, anchors, lengths, text, keys, values,
// rows.
static std::vector<float> draft(std::vector<Array> a, int threads, int delays) {
  const DrafterSizes& sizes = *as<DrafterSizes>(a[0]);
  const int batch = (int)a[7].size() / 4;
  std::vector<float> logits(batch * (sizes.block - 1) * sizes.target_vocab);
  std::vector<int32_t> tokens(batch * (sizes.block - 1));
  Array scratch(Draft::scratch_bytes(sizes, batch));
  const DraftModel model = {sizes,
                            *as<DrafterNumbers>(a[1]),
                            {a[5].data(), a[5].size(), as<int32_t>(a[6])},
                            {as<float>(a[10]), as<float>(a[11]), *as<int32_t>(a[12])},
                            batch};
  std::vector<float> likelihoods(tokens.size());
  const DraftArrays arrays = {as<int32_t>(a[7]), as<int32_t>(a[8]),  as<int32_t>(a[9]), logits.data(),
                              tokens.data(),     likelihoods.data(), scratch.data()};
  run(a[2], Draft(model, {a[3].data(), a[3].size(), as<int32_t>(a[4])}, arrays), threads, delays);
  logits.insert(logits.end(), tokens.begin(), tokens.end());
  logits.insert(logits.end(), likelihoods.begin(), likelihoods.end());
  return logits;
}

int main(int count, char** arguments) {
  const auto one = std::string(arguments[1]) == "step" ? step : draft;
  const std::vector<Array> arrays = read_arrays(arguments[2]);
  const std::vector<float> expected = one(arrays, 1, 0);
  for (int delays = 0; delays < 6; delays++) {
    for (int threads : {2, 8}) {
      const std::vector<float> found = one(arrays, threads, delays);
      if (std::memcmp(found.data(), expected.data(), 4 * found.size())) {
        std::printf("%d threads with delays %d gave other bits\n", threads, delays);
        return 1;
      }
    }
  }
  std::puts("equal");
}
