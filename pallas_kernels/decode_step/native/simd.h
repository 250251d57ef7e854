// One vector type, `F`: W floats of the machine, and the few operations that the step needs. Everything above this file
// is written once; paths differ in what the compiler is told (see build.py) and in what stands here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "names.h"

#if defined(__AVX512F__)
#include <immintrin.h>
using F = __m512;
constexpr int W = 16, REGISTERS = 32;

inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F divide(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }
inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }
inline F round_even(F x) { return _mm512_roundscale_ps(x, 0); }
// 2^n for whole n in -126..127.
inline F power_of_two(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// The first `count` lanes of x; 0 from there on.
inline F first(F x, int count) { return _mm512_maskz_mov_ps(count >= 16 ? 0xFFFF : (1u << count) - 1, x); }

// W rows of E2M1 codes: nibble k of each 32-bit lane.
inline F from_e2m1(const uint8_t* p, int k) {
  const F values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 4 * k), values);
}
inline F from_e8m0(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23));
}
// W bytes of E4M3, as 2^-8 of their value: widened to float16, whose subnormals are exact at any setting.
inline F from_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xBFFF)));
}
// W rows of bf16 pairs: the low or the high entry of each 32-bit lane.
inline F low_bf16(const uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline F high_bf16(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xFFFF0000)));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
inline void pause() { _mm_pause(); }

#elif defined(__AVX2__)
#include <immintrin.h>
using F = __m256;
constexpr int W = 8, REGISTERS = 16;

inline F zero() { return _mm256_setzero_ps(); }
inline F all(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F divide(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }
inline F round_even(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F power_of_two(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F first(F x, int count) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), place)));
}

inline F from_e2m1(const uint8_t* p, int k) {
  const F magnitudes = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);  // chosen by three bits; the fourth is the sign
  const __m256i codes = _mm256_loadu_si256((const __m256i*)p);
  const __m256i code = _mm256_srli_epi32(codes, 4 * k);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28 - 4 * k), _mm256_set1_epi32((int)0x80000000));
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, code), _mm256_castsi256_ps(sign));
}
inline F from_e8m0(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 23));
}
inline F from_e4m3(const uint8_t* p) {
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xBFFF)));
}
inline F low_bf16(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
inline F high_bf16(const uint8_t* p) {
  const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), high));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
inline void pause() { _mm_pause(); }

#elif defined(__ARM_NEON)
#include <arm_neon.h>
using F = float32x4_t;
constexpr int W = 4, REGISTERS = 32;

inline F zero() { return vdupq_n_f32(0); }
inline F all(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F divide(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F maximum(F a, F b) { return vmaxq_f32(a, b); }
inline F minimum(F a, F b) { return vminq_f32(a, b); }
inline F round_even(F x) { return vrndnq_f32(x); }
inline F power_of_two(F n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline F first(F x, int count) {
  const int32_t places[4] = {0, 1, 2, 3};
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcltq_s32(vld1q_s32(places), vdupq_n_s32(count))));
}

inline F from_e2m1(const uint8_t* p, int k) {
  // The two high bytes of each float by table; an index past it gives the zeros of the low ones.
  const uint8x16x2_t bytes = {
      {{0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0},
       {0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0, 0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0}}};
  const uint32x4_t code = vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_s32(-4 * k)), vdupq_n_u32(15));
  const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x0010FFFF), code, 0x01010000);
  return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(index)));
}
inline F from_e8m0(const uint8_t* p) {
  const uint32_t scales[4] = {p[0], p[1], p[2], p[3]};
  return vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32(scales), 23));
}
inline F from_e4m3(const uint8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  const int16x8_t wide = vshlq_n_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))), 7);
  return vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vget_low_s16(wide), vdup_n_s16((short)0xBFFF))));
}
inline F low_bf16(const uint8_t* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(p)), 16));
}
inline F high_bf16(const uint8_t* p) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_u32(0xFFFF0000)));
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void pause() { asm volatile("yield"); }

#else
#error "no vector path for this machine: AVX-512, AVX2 with FMA and F16C, or NEON is needed"
#endif

// Eight floats in the order in which weights keep their columns: 0, 4, 1, 5, 2, 6, 3, 7.
inline void store_inputs(float* p, const float* x) {
#if defined(__AVX2__)
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  store(p, vzip1q_f32(load(x), load(x + 4))), store(p + 4, vzip2q_f32(load(x), load(x + 4)));
#endif
}

// What products read. Where the machine multiplies pairs of bf16, a weight of any packed format is exact as one, and an
// input is two: `Precise` keeps 16 bits, the upper and the rest. `Compact` is the upper alone, for the drafter, whose
// precision changes no text. Elsewhere both are floats.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define BF16_DOT
struct Precise {
  uint32_t bits;  // of eight inputs: four pairs of upper parts, then four of the rest
};
// In the place of 32 of them what E2M1 weights read, which doubled are bytes: x = scale (256 upper + lower), 16 bits of
// the largest. Products of bytes are exact in any order, and twice as many at a time.
struct alignas(64) Digits {
  int8_t bytes[4][4][4];  // of each 8 columns: upper of columns 0, 2, 4, 6, upper of 1, 3, 5, 7, then so the lower
  float scale;            // of doubled weights
  int32_t upper, lower;   // where their sums begin: weights are read as if they were 12 larger, bytes without a sign
};
static_assert(sizeof(Digits) == GROUP * sizeof(Precise));
using Compact = uint16_t;
using Pairs = __m512i;  // per lane two columns, as bf16

inline Pairs load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Pairs all_pairs(const void* x) {
  int32_t both;
  std::memcpy(&both, x, 4);
  return _mm512_set1_epi32(both);
}
inline F dot(F sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

inline __m128i in_order(__m256 x, __m256* rest) {
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  const __m128i upper = (__m128i)_mm256_cvtneps_pbh(x);
  *rest = _mm256_sub_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16)));
  return _mm_shuffle_epi8(upper, order);
}
inline void store_inputs(Compact* p, const float* x) {
  __m256 rest;
  _mm_storeu_si128((__m128i*)p, in_order(_mm256_loadu_ps(x), &rest));
}
inline void store_inputs(Precise* p, const float* x) {
  __m256 rest, lost;
  _mm_storeu_si128((__m128i*)p, in_order(_mm256_loadu_ps(x), &rest));
  _mm_storeu_si128((__m128i*)(p + 4), in_order(rest, &lost));
}

inline void store_digits(Digits* out, const float* x) {
  const __m512 here[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
  const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(here[0]), _mm512_abs_ps(here[1])));
  const float scale = (top > 1e-30f ? top : 1e-30f) / (127 * 256);
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  __m512i uppers = _mm512_setzero_si512(), lowers = uppers;
  for (int half = 0; half < 2; half++) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(here[half], _mm512_set1_ps(1 / scale)));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
    const __m128i u = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(upper), order);
    const __m128i l = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(lower), order);
    _mm_store_si128((__m128i*)out->bytes[2 * half], _mm_unpacklo_epi64(u, l));
    _mm_store_si128((__m128i*)out->bytes[2 * half + 1], _mm_unpackhi_epi64(u, l));
    uppers = _mm512_add_epi32(uppers, upper), lowers = _mm512_add_epi32(lowers, lower);
  }
  const bool is_nan = _mm512_cmpunord_ps_mask(here[0], here[1]);
  out->scale = is_nan ? NAN : scale / 2;
  out->upper = -12 * _mm512_reduce_add_epi32(uppers), out->lower = -12 * _mm512_reduce_add_epi32(lowers);
}

// 12 more than twice the weights: of columns 0, 2, 4, 6 of each lane, then of 1, 3, 5, 7. An index's upper two bits
// belong to a neighbour, so the 16 values stand in the table four times.
inline void bytes_from_e2m1(const uint8_t* p, __m512i* w) {
  const __m128i one = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  const __m512i values = _mm512_broadcast_i32x4(one);
  const __m512i codes = _mm512_loadu_si512(p);
  w[0] = _mm512_permutexvar_epi8(codes, values);
  w[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), values);
}
inline __m512i dot_bytes(__m512i sum, __m512i w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}

// Eight inputs as floats, for weights that bf16 cannot hold.
inline __m256 as_floats(const void* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void widen(const Compact* p, float* out) { _mm256_storeu_ps(out, as_floats(p)); }
inline void widen(const Precise* p, float* out) {
  _mm256_storeu_ps(out, _mm256_add_ps(as_floats(p), as_floats(p + 4)));
}

// Nibbles k and k + 4 of each lane. A word's fifth bit also selects, so every value stands in the table twice.
inline Pairs pairs_from_e2m1(const uint8_t* p, int k) {
  const __m256i values = _mm256_setr_epi16(0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,   //
                                           (short)0x8000, (short)0xBF00, (short)0xBF80, (short)0xBFC0,  //
                                           (short)0xC000, (short)0xC040, (short)0xC080, (short)0xC0C0);
  const Pairs codes = _mm512_srli_epi16(_mm512_loadu_si512(p), 4 * k);
  return _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(values));
}

// The two bytes of an E4M3 magnitude as bf16 (2^-8 of its value), for each of 128 codes; and which bytes of four
// columns of low and of high bytes make pairs.
struct E4m3Tables {
  alignas(64) uint8_t low[128], high[128], places[2][64];
  E4m3Tables() {
    for (int code = 0; code < 128; code++) {
      const int exponent = code >> 3;
      const float value = std::ldexp((float)(exponent ? 8 + (code & 7) : code & 7), (exponent ? exponent : 1) - 18);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      low[code] = bits >> 16, high[code] = bits >> 24;
    }
    for (int pair = 0; pair < 2; pair++)
      for (int lane = 0; lane < 16; lane++)
        for (int byte = 0; byte < 4; byte++)  // the low one of the first column, its high one, those of the second
          places[pair][4 * lane + byte] = 16 * (2 * pair + byte / 2) + lane + (byte % 2 ? 64 : 0);
  }
};
inline const E4m3Tables e4m3_tables;

// Four columns of W rows: two vectors of pairs.
inline void pairs_from_e4m3(const uint8_t* p, Pairs* pairs) {
  const E4m3Tables& t = e4m3_tables;
  const __m512i codes = _mm512_loadu_si512(p);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(t.low), codes, _mm512_load_si512(t.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(t.high), codes, _mm512_load_si512(t.high + 64));
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8);  // high | (codes & 0x80)
  pairs[0] = _mm512_permutex2var_epi8(low, _mm512_load_si512(t.places[0]), high);
  pairs[1] = _mm512_permutex2var_epi8(low, _mm512_load_si512(t.places[1]), high);
}
#else
using Precise = float;
using Compact = float;
#endif

// A group of 32 inputs, as products with a matrix of `format` read them.
template <class T>
void put_group(T* out, const float* x, int format) {
#ifdef BF16_DOT
  if (std::is_same_v<T, Precise> && format == MXFP4) return store_digits((Digits*)out, x);
#endif
  for (int i = 0; i < GROUP; i += 8) store_inputs(out + i, x + i);
}

// Halves onto halves, until one lane is left.
template <class Join>
inline float across(F x, Join join) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}
inline float sum(F x) {
  return across(x, [](float a, float b) { return a + b; });
}
inline float largest(F x) {
  return across(x, [](float a, float b) { return b > a ? b : a; });
}

// e^x = 2^n e^r with |r| <= ln(2)/2, e^r by its Taylor polynomial: relative error below 2e-7. Outside of -87..88 it is
// the value at the end. A NaN stays one: of a NaN and a number, both instruction sets' minimum and maximum return the
// second.
inline F exponential(F x) {
  x = minimum(all(88.f), maximum(all(-87.f), x));
  const F n = round_even(mul(x, all(1.44269504f)));
  const F r = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), x));
  F p = all(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = fma(p, r, all(c));
  return mul(p, power_of_two(n));
}
