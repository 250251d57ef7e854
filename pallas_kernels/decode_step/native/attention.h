// Attention of a few queries over rows of keys, [S/16][Q][16], and values [S][V].
//
// Rows are visited in their order in the cache, and rows that a query does not see add nothing, so what a token attends
// to has the same bits whether it was read alone or in a block.
#pragma once

#include <algorithm>
#include <cfloat>
#include <vector>

#include "simd.h"

// `count` rows, a multiple of LANES. Those of several sources are numbered one after the other.
struct Rows {
  float *keys, *values;
  int count;
};

struct Span {  // rows [first, last)
  int first = 0, last = 0;
};

struct Query {
  const float* vector;  // rotated and scaled
  float* out;           // V values
  float sink;           // a logit without a value; -FLT_MAX for none
  Span spans[3];        // the rows it sees
};

// Puts a key of `dims` dimensions into a row.
inline void put_key(float* keys, const float* key, int dims, int row) {
  float* lane = keys + (size_t)(row / LANES) * dims * LANES + row % LANES;
  for (int d = 0; d < dims; d++) lane[d * LANES] = key[d];
}

// What positions [first, end) are in a ring of `rows`: one span, or one at its end and one at its beginning.
inline void see_ring(Query& query, int first, int end, int rows) {
  const int from = first % rows, length = end - first;
  query.spans[0] = {from, std::min(from + length, rows)};
  if (from + length > rows) query.spans[1] = {0, from + length - rows};
}

// Scores of N vectors of rows from `row` on, for R queries; the sum over dimensions is in their order. Meanwhile what is
// read after them, at `next`, is fetched.
template <int R, int N>
void score(const Query* queries, const Rows& rows, int dims, int row, const float* next, float* scores, size_t width) {
  F sum[R][N];
  for (auto& q : sum)
    for (F& s : q) s = zero();
  const float* keys = rows.keys + (size_t)row * dims;
  for (int d = 0; d < dims; d++, keys += LANES) {
    F key[N];
    for (int n = 0; n < N; n++) key[n] = load(keys + n * W / LANES * LANES * dims + n * W % LANES);
    for (int n = 0; n < N * W; n += LANES) prefetch(next + d * LANES + n * dims);
    for (int r = 0; r < R; r++) {
      const F value = all(queries[r].vector[d]);
      for (int n = 0; n < N; n++) sum[r][n] = fma(key[n], value, sum[r][n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(scores + r * width + row + n * W, sum[r][n]);
}

// Scores become weights, 0 where the query sees nothing; returns their sum.
inline float soften(const Query& q, float* scores, int first, int last) {
  float top = q.sink;
  for (const Span& span : q.spans) {
    int row = span.first;
    if (span.last - row >= W) {
      F lanes = load(scores + row);
      for (; row + W <= span.last; row += W) lanes = maximum(lanes, load(scores + row));
      top = std::max(top, largest(lanes));
    }
    for (; row < span.last; row++) top = std::max(top, scores[row]);
  }
  F total = zero();
  for (int row = first; row < last; row += W) {
    F weight = zero();
    for (const Span& span : q.spans) {
      if (span.last <= row || span.first >= row + W) continue;
      F seen = ::first(exponential(sub(load(scores + row), all(top))), span.last - row);
      if (span.first > row) seen = sub(seen, ::first(seen, span.first - row));
      weight = add(weight, seen);
    }
    store(scores + row, weight);
    total = add(total, weight);
  }
  return sum(total) + (q.sink > -FLT_MAX ? std::exp(q.sink - top) : 0.f);
}

// N vectors of dimensions of the values, weighted and added up: even and odd rows apart, which makes two shorter
// chains.
template <int R, int N>
void combine(const Query* queries, const Rows* sources, int source_count, const int* begin, const int* end,
             size_t value_dims, size_t dim, const float* scores, size_t width, const float* totals) {
  F sum[2][R][N];
  for (auto& half : sum)
    for (auto& q : half)
      for (F& s : q) s = zero();
  for (int i = 0; i < source_count; scores += sources[i++].count) {
    for (int row = begin[i]; row < end[i]; row += 2) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        F value[N];
#pragma GCC unroll 8
        for (int n = 0; n < N * W; n += LANES) prefetch(sources[i].values + (row + half + 16) * value_dims + dim + n);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) value[n] = load(sources[i].values + (row + half) * value_dims + dim + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const F weight = all(scores[r * width + row + half]);
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) sum[half][r][n] = fma(value[n], weight, sum[half][r][n]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++)
      store(queries[r].out + dim + n * W, divide(add(sum[0][r][n], sum[1][r][n]), all(totals[r])));
}

// R queries over all sources. What one query gets does not depend on who is attended beside it.
template <int R>
void attend_tile(const Query* queries, const Rows* sources, int source_count, int dims, size_t value_dims,
                 float* scores, size_t width) {
  constexpr int one = LANES / W, wide = R == 1 ? 4 * one : 2 * one;
  int begin[2], end[2], offset = 0;  // of each source, as whole vectors of rows that any query sees
  for (int i = 0; i < source_count; i++) {
    const int count = sources[i].count;
    begin[i] = count, end[i] = 0;
    for (int r = 0; r < R; r++) {
      for (const Span& span : queries[r].spans) {
        const int first = std::max(span.first - offset, 0), last = std::min(span.last - offset, count);
        if (first < last) begin[i] = std::min(begin[i], first / LANES * LANES), end[i] = std::max(end[i], last);
      }
    }
    end[i] = (end[i] + LANES - 1) / LANES * LANES;
    int row = begin[i];
    const auto next = [&](int row) {
      return row < end[i] ? sources[i].keys + (size_t)row * dims : sources[i].values + begin[i] * value_dims;
    };
    for (; row + wide * W <= end[i]; row += wide * W)
      score<R, wide>(queries, sources[i], dims, row, next(row + wide * W), scores + offset, width);
    for (; row < end[i]; row += LANES)
      score<R, one>(queries, sources[i], dims, row, next(row + LANES), scores + offset, width);
    offset += count;
  }
  const int from = begin[0] < end[0] ? begin[0] : sources[0].count, to = source_count > 1 ? offset : end[0];
  if (source_count > 1)  // between the sources' rows
    for (int r = 0; r < R; r++) std::fill(scores + r * width + end[0], scores + r * width + sources[0].count, 0.f);
  float totals[R];
  for (int r = 0; r < R; r++) totals[r] = soften(queries[r], scores + r * width, from, to);
  constexpr int C = std::min(R, 4);  // so many sums stay in registers
  for (int r = 0; r < R; r += C, queries += C, scores += C * width) {
    size_t dim = 0;
    for (; dim + 2 * LANES <= value_dims; dim += 2 * LANES)
      combine<C, 2 * one>(queries, sources, source_count, begin, end, value_dims, dim, scores, width, totals + r);
    if (dim < value_dims)
      combine<C, one>(queries, sources, source_count, begin, end, value_dims, dim, scores, width, totals + r);
  }
}

// `value_dims` is a multiple of LANES; outputs have room for so many.
inline void attend(const Query* queries, int count, const Rows* sources, int source_count, int dims,
                   size_t value_dims) {
  constexpr int R = W == LANES ? 8 : 2;
  size_t width = 0;
  for (int i = 0; i < source_count; i++) width += sources[i].count;
  thread_local std::vector<float> scores;
  if (scores.size() < R * width) scores.resize(R * width);
  for (; count >= R; count -= R, queries += R)
    attend_tile<R>(queries, sources, source_count, dims, value_dims, scores.data(), width);
  for (; W == LANES && count >= 4; count -= 4, queries += 4)
    attend_tile<4>(queries, sources, source_count, dims, value_dims, scores.data(), width);
  for (; count > 0; count--, queries++)
    attend_tile<1>(queries, sources, source_count, dims, value_dims, scores.data(), width);
}
