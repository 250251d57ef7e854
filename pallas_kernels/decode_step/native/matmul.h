// Products of a few tokens with packed weights.
//
// A matrix [O, I] lies in blocks of 16 output rows, one per lane, so that no sum crosses lanes. Whatever the number of
// tokens or threads, an output is added up in one order: 32 products, then, times their scale, onto the sum of those
// before. So a token has the same bits alone as in a block.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

constexpr int MOST_TOKENS = W == LANES ? 8 : 4;  // of one tile: their sums stay in registers

// Where a matrix lies. Rows are padded to whole blocks, columns to whole groups, with zeros.
struct Matrix {
  const uint8_t* data;
  const uint8_t* scales;
  int format, rows, cols;
  bool is_far;  // in memory rather than in a cache: to be fetched ahead

  int groups() const { return (cols + GROUP - 1) / GROUP; }
  int blocks() const { return (rows + LANES - 1) / LANES; }
};

// Whether a product of such inputs has two sums.
template <class X>
constexpr bool is_split = !std::is_same_v<X, float> && sizeof(X) >= 4;

template <int format>
struct Packed;

template <>
struct Packed<F32> {  // [block][column][lane]
  static constexpr int group_bytes = GROUP * LANES * 4, scale_bytes = 0, groups_per_scale = 1;
  static F at(const uint8_t* p, int lane, int k) { return load((const float*)p + LANES * k + lane); }
  static F scale(const uint8_t*, int) { return all(1.f); }
};
template <>
struct Packed<BF16> {  // [block][pair of columns][lane][2]
  static constexpr int group_bytes = GROUP * LANES * 2, scale_bytes = 0, groups_per_scale = 1;
  static F at(const uint8_t* p, int lane, int k) {
    p += LANES * 4 * (k / 2) + 4 * lane;
    return k % 2 ? high_bf16(p) : low_bf16(p);
  }
  static F scale(const uint8_t*, int) { return all(1.f); }
};
template <>
struct Packed<FP8> {  // [block][column][lane]; a float32 scale per lane and 128 columns, times 2^8
  static constexpr int group_bytes = GROUP * LANES, scale_bytes = LANES * 4, groups_per_scale = FP8_BLOCK / GROUP;
  static F at(const uint8_t* p, int lane, int k) { return from_e4m3(p + LANES * k + lane); }
  static F scale(const uint8_t* p, int lane) { return load((const float*)p + lane); }
};
template <>
struct Packed<MXFP4> {  // [block][8 columns][lane]; an E8M0 scale per lane and group
  static constexpr int group_bytes = GROUP * LANES / 2, scale_bytes = LANES, groups_per_scale = 1;
  static F at(const uint8_t* p, int lane, int k) { return from_e2m1(p + LANES * 4 * (k / 8) + 4 * lane, ORDER[k % 8]); }
  static F scale(const uint8_t* p, int lane) { return from_e8m0(p + lane); }
};

// Bytes of a block of rows, and of its scales.
template <int format>
size_t block_bytes(const Matrix& a) {
  return (size_t)a.groups() * Packed<format>::group_bytes;
}
template <int format>
size_t scale_bytes(const Matrix& a) {
  constexpr int groups = Packed<format>::groups_per_scale;
  return (size_t)((a.groups() + groups - 1) / groups) * Packed<format>::scale_bytes;
}

// Calls `act` with the format as a constant.
template <class Act>
void by_format(int format, Act act) {
  if (format == MXFP4) act(std::integral_constant<int, MXFP4>{});
  else if (format == FP8) act(std::integral_constant<int, FP8>{});
  else if (format == BF16) act(std::integral_constant<int, BF16>{});
  else act(std::integral_constant<int, F32>{});
}

// part += weights of a group times inputs, for M tokens and N vectors of rows.
template <int format, int M, int N>
inline void multiply_group(const uint8_t* const* p, const float* const* x, int group, F (&part)[M][N]) {
#pragma GCC unroll 8
  for (int k = 0; k < GROUP; k++) {
    F w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) w[n] = Packed<format>::at(p[n], n * W % LANES, k);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const F value = all(x[m][group * GROUP + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) part[m][n] = fma(w[n], value, part[m][n]);
    }
  }
}

#ifdef BF16_DOT
// Pairs of columns of W rows: a line of 64 bytes has `line_pairs` of them.
template <int format>
constexpr int line_pairs = format == MXFP4 ? 4 : format == FP8 ? 2 : 1;

template <int format>
void pairs_of_line(const uint8_t* p, Pairs* pairs) {
  static_assert(format != F32);
  if constexpr (format == FP8) pairs_from_e4m3(p, pairs);
  else if constexpr (format == BF16) pairs[0] = load_pairs(p);
  else for (int i = 0; i < 4; i++) pairs[i] = pairs_from_e2m1(p, i);
}

// The upper parts of inputs and the rest, if there is any, are summed apart: twice the chains, half as long.
template <int format, int M, int N, class X>
inline void multiply_group(const uint8_t* const* p, const X* const* x, int group, F (&part)[M][N]) {
  constexpr int count = line_pairs<format>;
  F rest[M][N];
  for (auto& row : rest)
    for (F& s : row) s = zero();
#pragma GCC unroll 4
  for (int line = 0; line < GROUP / 2 / count; line++) {
    Pairs w[N][count];
    for (int n = 0; n < N; n++) pairs_of_line<format>(p[n] + 64 * line, w[n]);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      const int pair = line * count + i, place = pair / 4 * 8;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const char* pairs = (const char*)(x[m] + group * GROUP + place) + pair % 4 * 4;
        const Pairs upper = all_pairs(pairs), lower = is_split<X> ? all_pairs(pairs + 16) : upper;
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          part[m][n] = dot(part[m][n], w[n][i], upper);
          if (is_split<X>) rest[m][n] = dot(rest[m][n], w[n][i], lower);
        }
      }
    }
  }
  if (is_split<X>)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) part[m][n] = add(part[m][n], rest[m][n]);
}

// Sums of a group are whole numbers below 2^24: exact as floats.
template <int format, int M, int N>
inline void multiply_group(const uint8_t* const* p, const Digits* const* x, int group, F (&part)[M][N]) {
  static_assert(format == MXFP4);
  __m512i upper[M][N], lower[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      upper[m][n] = _mm512_set1_epi32(x[m][group].upper), lower[m][n] = _mm512_set1_epi32(x[m][group].lower);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      __m512i w[2];
      bytes_from_e2m1(p[n] + 64 * k, w);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        for (int i = 0; i < 2; i++) {
          upper[m][n] = dot_bytes(upper[m][n], w[i], x[m][group].bytes[k][i]);
          lower[m][n] = dot_bytes(lower[m][n], w[i], x[m][group].bytes[k][2 + i]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      part[m][n] = mul(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper[m][n], 8), lower[m][n])),
                       all(x[m][group].scale));
}
#endif

// M tokens times N vectors of rows, beginning at lane 0 of `block`; `sums` is [M][N * W].
template <int format, int M, int N, class X>
void tile(const Matrix& a, int block, const X* const* x, float* sums) {
  using P = Packed<format>;
  const int groups = a.groups();
  const size_t data_size = block_bytes<format>(a), scales_size = scale_bytes<format>(a);  // of a block
  const uint8_t* data = a.data + block * data_size;
  const uint8_t* scales = a.scales + block * scales_size;
  constexpr size_t next = std::max(N * W / LANES, 1);  // so many blocks on, the next tile begins
  // A single token's plain weights come from a cache as fast as fetches can be asked for.
  const bool ahead = M > 1 || P::scale_bytes || a.is_far;
  F sum[M][N];
  for (auto& row : sum)
    for (F& s : row) s = zero();
  for (int group = 0; group < groups; group++) {
    F part[M][N];
    for (auto& row : part)
      for (F& s : row) s = zero();
    const uint8_t* p[N];
    for (int n = 0; n < N; n++) {
      p[n] = data + n * W / LANES * data_size + (size_t)group * P::group_bytes;
      for (int line = 0; ahead && line < P::group_bytes; line += 64) prefetch(p[n] + next * data_size + line);
    }
    if (ahead && P::scale_bytes) prefetch(scales + next * scales_size + (size_t)group * N * W);
    multiply_group<format, M, N>(p, x, group, part);
    for (int n = 0; n < N; n++) {
      const uint8_t* s = scales + n * W / LANES * scales_size + group / P::groups_per_scale * P::scale_bytes;
      const F scale = P::scale(s, n * W % LANES);
      for (int m = 0; m < M; m++) sum[m][n] = fma(part[m][n], scale, sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(sums + (m * N + n) * W, sum[m][n]);
}

// Steps `block` on for as long as whole tiles fit.
template <int format, int M, int N, class X>
void tiles(const Matrix& a, int& block, int last, const X* const* x, int tokens, float* const* out) {
  constexpr int blocks = N * W / LANES;
  float sums[M * N * W];
  for (; block + blocks <= last; block += blocks) {
    tile<format, M, N>(a, block, x, sums);
    const int row = block * LANES, width = std::min(blocks * LANES, a.rows - row);
    for (int m = 0; m < tokens; m++) std::memcpy(out[m] + row, sums + m * N * W, width * 4);
  }
}

template <int format, int M, class X>
void tokens_of(const Matrix& a, int first, int last, const X* const* x, int tokens, float* const* out) {
  // As many blocks as leave registers for weights; narrower tiles end what wider ones leave.
  constexpr int one = LANES / W, sums = M * one * (is_split<X> ? 2 : 1);
  constexpr int wide = std::max(1, std::min(4, (REGISTERS - 12) / sums)) * one;
  int block = first;
  tiles<format, M, wide>(a, block, last, x, tokens, out);
  if (wide > 2 * one) tiles<format, M, 2 * one>(a, block, last, x, tokens, out);
  if (wide > one) tiles<format, M, one>(a, block, last, x, tokens, out);
}

template <int format, class X>
void multiply_as(const Matrix& a, int first, int last, const X* const* x, int tokens, float* const* out) {
  for (int token = 0; token < tokens; token += MOST_TOKENS) {
    const int left = std::min(tokens - token, MOST_TOKENS);
    const X* rows[MOST_TOKENS];
    for (int m = 0; m < MOST_TOKENS; m++) rows[m] = x[token + std::min(m, left - 1)];
    float* const* here = out + token;
    if (left == 1) tokens_of<format, 1>(a, first, last, rows, left, here);
    else if (left == 2) tokens_of<format, 2>(a, first, last, rows, left, here);
    else if (left == 3) tokens_of<format, 3>(a, first, last, rows, left, here);
    else if (left == 4) tokens_of<format, 4>(a, first, last, rows, left, here);
    else if (left <= 6) tokens_of<format, std::min(MOST_TOKENS, 6)>(a, first, last, rows, left, here);
    else tokens_of<format, MOST_TOKENS>(a, first, last, rows, left, here);
  }
}

// Inputs as floats, for weights that bf16 cannot hold: the products are those of floats.
template <class X>
void multiply_widened(const Matrix& a, int first, int last, const X* const* x, int tokens, float* const* out) {
  const size_t columns = a.groups() * GROUP;
  std::vector<float> wide(tokens * columns);
  std::vector<const float*> rows;
  for (int m = 0; m < tokens; m++) {
    for (size_t i = 0; i < columns; i += 8) widen(x[m] + i, &wide[m * columns + i]);
    rows.push_back(&wide[m * columns]);
  }
  multiply_as<F32>(a, first, last, rows.data(), tokens, out);
}

// Blocks [first, last) of rows times x[0..tokens), inputs with padded columns, put for the matrix: out[token][row].
template <class X>
void multiply(const Matrix& a, int first, int last, const X* const* x, int tokens, float* const* out) {
  by_format(a.format, [&](auto format) {
    if constexpr (format == F32 && !std::is_same_v<X, float>) multiply_widened(a, first, last, x, tokens, out);
#ifdef BF16_DOT
    else if constexpr (format == MXFP4 && std::is_same_v<X, Precise>)
      multiply_as<format>(a, first, last, (const Digits* const*)x, tokens, out);
#endif
    else multiply_as<format>(a, first, last, x, tokens, out);
  });
}
