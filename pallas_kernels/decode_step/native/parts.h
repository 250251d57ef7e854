// What target and drafter share: their weights, the buffers of a round, and the rows that both have.
#pragma once

#include <cfloat>
#include <vector>

#include "executor.h"
#include "matmul.h"
#include "names.h"

constexpr size_t LAST_CACHE = 16 << 20;  // bytes that stay near from step to step, about

inline size_t padded(size_t n, size_t to) { return (n + to - 1) / to * to; }

// All weights in one array of so many bytes, and where each lies in it: rows of (data, scales, format, rows, columns),
// offsets in 64 bytes.
struct Weights {
  const uint8_t* bytes;
  size_t size;
  const int32_t* directory;

  Matrix matrix(int slot) const {
    const int32_t* d = directory + 5 * slot;
    return {bytes + 64 * (size_t)d[0], bytes + 64 * (size_t)d[1], d[2], d[3], d[4], size > LAST_CACHE};
  }
  // One of a stack of equal matrices.
  Matrix matrix(int slot, int index) const {
    Matrix a = matrix(slot);
    by_format(a.format, [&](auto format) {
      a.data += (size_t)index * a.blocks() * block_bytes<format>(a);
      a.scales += (size_t)index * a.blocks() * scale_bytes<format>(a);
    });
    return a;
  }
  const float* vector(int slot) const { return (const float*)matrix(slot).data; }
  bool has(int slot) const { return directory[5 * slot + 3] > 0; }

  // Row `index` of a table that is stored as it is: bf16 or float32 [rows][columns]. Beyond its ends, as XLA's gather
  // does, the row there.
  void look_up(int slot, int index, float* out) const {
    const Matrix a = matrix(slot);
    index = std::min(std::max(index, 0), a.rows - 1);
    if (a.format == F32) return (void)std::memcpy(out, a.data + 4 * (size_t)index * a.cols, 4 * a.cols);
    const uint16_t* row = (const uint16_t*)a.data + (size_t)index * a.cols;
    for (int i = 0; i < a.cols; i++) {
      const uint32_t bits = (uint32_t)row[i] << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
};

// Buffers one after the other. Without a base it only counts.
class Arena {
 public:
  explicit Arena(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    const size_t at = used_;
    used_ += padded(count * sizeof(T), 64);
    return (T*)(base_ + at);
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// [rows][stride], its columns padded to whole groups.
template <class T>
struct Buffer {
  T* data = nullptr;
  size_t stride = 0;

  static Buffer of(Arena& arena, size_t rows, size_t columns) {
    const size_t stride = padded(columns, GROUP);
    return {arena.take<T>(rows * stride), stride};
  }
  T* row(size_t i) const { return data + i * stride; }
};
using Floats = Buffer<float>;
using Inputs = Buffer<Precise>;
using Compacts = Buffer<Compact>;

// Whole eights of floats as inputs of a matrix that is not MXFP4.
template <class T>
void put_eights(const float* from, size_t count, T* out) {
  for (size_t i = 0; i < count; i += 8) store_inputs(out + i, from + i);
}

// `count` floats as a row of inputs of a matrix: MXFP4 reads others than all other formats. What padded columns multiply
// is 0.
template <class T>
void put(const float* from, size_t count, const Buffer<T>& to, size_t row, int format = BF16) {
  T* out = to.row(row);
  size_t i = 0;
  for (; i + GROUP <= count; i += GROUP) put_group(out + i, from + i, format);
  if (i == count) return;
  float rest[GROUP] = {};
  std::copy(from + i, from + count, rest);
  put_group(out + i, rest, format);
}

// Token m of a round stands at `position` of batch row `row`, and is `place` there in what is read now.
struct Token {
  int row, place, position;
};

// A product is computed in units of two blocks of rows; a gated one in units of features that are a group of inputs of
// what follows: two blocks of the gate and two of the up projection, which alternate.
static_assert(UNIT == 2 * LANES && FEATURES == GROUP);
inline int units_of(const Matrix& a) { return (a.rows + UNIT - 1) / UNIT; }
inline int gated_units_of(const Matrix& a) { return (a.rows + 2 * FEATURES - 1) / (2 * FEATURES); }

// Units [first, last) of `rows` output rows each.
template <class T>
void multiply_units(const Matrix& a, int first, int last, const std::vector<const T*>& x,
                    const std::vector<float*>& out, int rows = UNIT) {
  const int blocks = rows / LANES;
  multiply(a, first * blocks, std::min(last * blocks, a.blocks()), x.data(), (int)x.size(), out.data());
}

// Units of a product of rows [0, count) of `x`.
template <class T>
void product(const Matrix& a, int first, int last, const Buffer<T>& x, const Floats& out, int count, int rows = UNIT) {
  thread_local std::vector<const T*> from;
  thread_local std::vector<float*> to;
  from.clear(), to.clear();
  for (int m = 0; m < count; m++) from.push_back(x.row(m)), to.push_back(out.row(m));
  multiply_units(a, first, last, from, to, rows);
}
template <class T>
void product(const Row& row, const Matrix& a, const Buffer<T>& x, const Floats& out, int count) {
  product(a, row.first(units_of(a)), row.last(units_of(a)), x, out, count);
}

// silu(gate) * up of gated units [first, last) of a matrix `a`, as inputs of a matrix of `format`.
template <class T>
void swiglu(const Matrix& a, const float* gate_up, T* out, int first, int last, int format) {
  for (int unit = first; unit < last; unit++) {
    float hidden[FEATURES] = {};
    const float* gates = gate_up + unit * 2 * FEATURES;
    const int features = std::min(FEATURES, a.rows / 2 - unit * FEATURES);
    for (int at = 0; at < features; at += LANES, gates += 2 * LANES) {
      for (int lane = 0; lane < LANES; lane += W) {
        const F gate = load(gates + lane), up = load(gates + LANES + lane);
        const F silu = divide(gate, add(all(1.f), exponential(sub(zero(), gate))));
        store(hidden + at + lane, mul(silu, up));
      }
    }
    put_group(out + unit * FEATURES, hidden, format);
  }
}

// This row's share of what stands between a gated FFN's products.
template <class T>
void gate_up(const Row& row, const Matrix& a, const Matrix& down, const Buffer<T>& x, const Floats& gated,
             const Buffer<T>& hidden, int count) {
  const int first = row.first(gated_units_of(a)), last = row.last(gated_units_of(a));
  product(a, first, last, x, gated, count, 2 * FEATURES);
  for (int m = 0; m < count; m++) swiglu(a, gated.row(m), hidden.row(m), first, last, down.format);
}

// Units [first, last) of matrices that have `units` each, matrix by matrix: act(matrix, its first unit, its last).
template <class Act>
void by_matrix(int first, int last, int units, Act act) {
  for (int unit = first; unit < last;) {
    const int begin = unit % units, end = std::min(units, begin + last - unit);
    act(unit / units, begin, end);
    unit += end - begin;
  }
}

inline void normalize(const float* x, const float* gain, float* out, int size, float eps) {
  F squares = zero();
  int i = 0;
  for (; i + W <= size; i += W) squares = fma(load(x + i), load(x + i), squares);
  float rest = 0;
  for (; i < size; i++) rest += x[i] * x[i];
  const float scale = 1.f / std::sqrt((sum(squares) + rest) / size + eps);
  for (i = 0; i < size; i++) out[i] = x[i] * scale * gain[i];
}

// Rotary angles of tokens: of each the cosines, then the sines.
class Angles {
 public:
  Angles() = default;
  Angles(Arena& arena, size_t tokens, int rotary) : data_(arena.take<float>(tokens * rotary)), half_(rotary / 2) {}

  void set(size_t token, int position, const float* frequencies) const {
    float *cos = data_ + token * 2 * half_, *sin = cos + half_;
    for (int i = 0; i < half_; i++) {
      const float angle = (float)position * frequencies[i];
      cos[i] = std::cos(angle), sin[i] = std::sin(angle);
    }
  }
  // Rotates pairs (i, i + half) of the first dimensions, NeoX style.
  void rotate(size_t token, float* x) const {
    const float *cos = data_ + token * 2 * half_, *sin = cos + half_;
    for (int i = 0; i < half_; i++) {
      const float first = x[i], second = x[half_ + i];
      x[i] = first * cos[i] - second * sin[i];
      x[half_ + i] = second * cos[i] + first * sin[i];
    }
  }

 private:
  float* data_ = nullptr;
  int half_ = 0;
};

// The first of the largest of x[first..last).
struct Best {
  float value;
  int id;
};
inline Best best_of(const float* x, int first, int last) {
  F lanes = all(-INFINITY);
  int i = first;
  for (; i + W <= last; i += W) lanes = maximum(lanes, load(x + i));
  float top = largest(lanes);
  for (; i < last; i++) top = std::max(top, x[i]);
  for (i = first; i < last; i++)
    if (x[i] == top) return {top, i};
  return {-INFINITY, first};  // NaN everywhere
}

// The same of several stretches, in their order.
inline Best best_of_shares(const Best* shares, int count) {
  Best best = shares[0];
  for (int i = 1; i < count; i++)
    if (shares[i].value > best.value) best = shares[i];
  return best;
}

// The sum of e^(x - top) over x[first..last).
inline float mass_of(const float* x, int first, int last, float top) {
  if (top == -INFINITY) return 0;  // so is all of x
  F lanes = zero();
  int i = first;
  for (; i + W <= last; i += W) lanes = add(lanes, exponential(sub(load(x + i), all(top))));
  float total = sum(lanes);
  for (; i < last; i++) total += std::exp(x[i] - top);
  return total;
}
