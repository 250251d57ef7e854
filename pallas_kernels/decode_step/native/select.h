// Which tokens a filter keeps, without sorting them all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// The largest entry t of p[0..count), all from 0 to 1, for which the weights of all entries from t on add up to
// `wanted`; 0 if none does. Floats that are not negative are in the order of their bits: buckets of their upper bits
// are added up from the top, and only the entries of the bucket where that is reached are sorted.
inline float least_kept(const float* p, const float* weights, int count, double wanted) {
  constexpr int SHIFT = 20, BUCKETS = (0x3F800000 >> SHIFT) + 1;
  const auto bucket_of = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::min(bits >> SHIFT, (uint32_t)BUCKETS - 1);
  };
  double sums[2][BUCKETS] = {};  // apart for even and odd entries: neighbours are often in one bucket
  for (int i = 0; i < count; i++) sums[i % 2][bucket_of(p[i])] += weights[i];
  double sum = 0;
  int bucket = BUCKETS - 1;
  for (; bucket >= 0; bucket--) {
    const double here = sums[0][bucket] + sums[1][bucket];
    if (here > 0 && sum + here >= wanted) break;
    sum += here;
  }
  if (bucket < 0) return 0;
  thread_local std::vector<std::pair<float, float>> entries;
  entries.clear();
  for (int i = 0; i < count; i++)
    if ((int)bucket_of(p[i]) == bucket) entries.push_back({p[i], weights[i]});
  std::sort(entries.begin(), entries.end(), [](auto a, auto b) { return a.first > b.first; });
  for (const auto& [entry, weight] : entries)
    if ((sum += weight) >= wanted) return entry;
  return entries.back().first;
}
