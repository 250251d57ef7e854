// The target's rows: what each kind of a step's table does.
#pragma once

#include "attention.h"
#include "parts.h"

// Arrays of one call. Caches are stacks per kind of layer: keys [L][B][K][S/16][Q][16], values
// [L][B][K][S][V].
struct TargetArrays {
  const int32_t *tokens, *lengths, *counts;  // [B][T], [B], [B]
  const float* media;                        // [R][D], for ids from the vocabulary's size on
  float *global_keys, *global_values, *sliding_keys, *sliding_values;
  float *logits, *hidden, *aux;   // [B][shown][C], [B][T][D], [B][T][aux layers][D]
  int32_t *expert_counts, *best;  // [MoE layers][E], [B][shown]
  uint8_t* scratch;
  int batch, steps, shown, global_rows, sliding_rows;
};

class Target {
 public:
  Target(const TargetSizes& sizes, const TargetNumbers& numbers, const int32_t* layers, const int32_t* aux_layers,
         int aux_count, Weights weights, const TargetArrays& arrays)
      : s(sizes), c(numbers), layers_(layers), aux_layers_(aux_layers), aux_count_(aux_count), w(weights), a(arrays) {
    for (int b = 0; b < a.batch; b++) {
      const int count = std::min(a.counts[b], a.steps);
      for (int t = 0; t < count; t++) tokens_.push_back({b, t, a.lengths[b] + t});
      if (count <= 0) continue;
      const int first = a.shown < a.steps ? count - 1 : 0;
      for (int t = first; t < count; t++) shown_.push_back({(int)tokens_.size() - count + t, b * a.shown + t - first});
    }
    clear_unread();
    Arena arena(a.scratch);
    reserve(arena, a.batch * a.steps, a.batch * a.shown);
  }

  static size_t scratch_bytes(const TargetSizes& sizes, int tokens, int shown) {
    Target only(sizes);
    Arena arena(nullptr);
    only.reserve(arena, tokens, shown);
    return arena.used();
  }

  bool is_idle() const { return tokens_.empty(); }

  void operator()(const Row& row) {
    switch (row.kind) {
      case EMBED: return embed(row);
      case NORM: return norm(row);
      case QKV: return product(row, slot(row, SLOT_QKV), normed, qkv, count());
      case ATTEND:
        return by_heads(row, kv_heads(row.layer), [&](int b, int head) {
          write_keys(row.layer, b, head), attend_group(row.layer, b, head);
        });
      case KEYS: return by_heads(row, kv_heads(row.layer), [&](int b, int head) { write_keys(row.layer, b, head); });
      case QUERIES:
        return by_heads(row, s.heads, [&](int b, int head) { attend_heads(row.layer, b, head, head + 1); });
      case OUTPUT: return product(row, slot(row, SLOT_OUTPUT), attended, part, count());
      case GATE_UP:
        return gate_up(row, slot(row, SLOT_GATE_UP), slot(row, SLOT_DOWN), normed, gated, hidden, count());
      case DOWN: return product(row, slot(row, SLOT_DOWN), hidden, part, count());
      case ROUTER: return product(row, slot(row, SLOT_ROUTER), routed, scores, count());
      case TOP_K: return top_k(row);
      case EXPERT_GATE_UP: return expert_gate_up(row);
      case EXPERT_DOWN: return expert_down(row);
      case HEAD: return head(row);
      case PICK: return pick(row);
    }
  }

 private:
  explicit Target(const TargetSizes& sizes) : s(sizes) {}

  struct Shown {
    int token, place;  // in tokens_, and in the arrays of logits
  };
  struct Pair {
    int token;
    float weight;
  };

  int count() const { return (int)tokens_.size(); }
  int layer(int index) const { return TOP_SLOTS + LAYER_SLOTS * index; }
  Matrix slot(const Row& row, int slot) const { return w.matrix(layer(row.layer) + slot); }
  bool has_experts(int index) const { return layers_[index] >> 1 & 1; }
  bool is_sliding(int index) const { return layers_[index] & 1; }
  int kv_heads(int index) const { return is_sliding(index) ? s.sliding_kv_heads : s.global_kv_heads; }

  void reserve(Arena& arena, size_t tokens, size_t shown) {
    const int kv = std::max(s.global_kv_heads, s.sliding_kv_heads);
    const size_t pairs = tokens * s.chosen, features = std::max<size_t>(s.features, 1);
    x = Floats::of(arena, tokens, s.width), part = Floats::of(arena, tokens, s.width);
    normed = Inputs::of(arena, tokens, s.width), routed = Floats::of(arena, tokens, s.width);
    qkv = Floats::of(arena, tokens, s.heads * s.head_dim + kv * (s.head_dim + s.value_dim));
    attended = Inputs::of(arena, tokens, s.heads * s.value_dim);
    gated = Floats::of(arena, tokens, 2 * padded(features, LANES)), hidden = Inputs::of(arena, tokens, features);
    scores = Floats::of(arena, tokens, s.experts);
    expert_gated = Floats::of(arena, pairs, 2 * padded(s.expert_features, LANES));
    expert_hidden = Inputs::of(arena, pairs, s.expert_features);
    for (Angles& kind : angles_) kind = Angles(arena, tokens, s.rotary);
    picks = arena.take<Best>(shown * MOST_SHARES);
    pairs_ = arena.take<Pair>(pairs), active_ = arena.take<int>(s.experts + 1),
    starts_ = arena.take<int>(s.experts + 1);
    chosen_ = arena.take<int>(pairs);
  }

  // What stands for padding is 0.
  void clear_unread() {
    for (int b = 0; b < a.batch; b++) {
      const int count = std::min(std::max(a.counts[b], 0), a.steps), shown = a.shown < a.steps ? count > 0 : count;
      const size_t row = (size_t)b * a.steps + count, unread = a.steps - count, first = (size_t)b * a.shown + shown;
      std::fill_n(a.hidden + row * s.width, unread * s.width, 0.f);
      std::fill_n(a.aux + row * aux_count_ * s.width, unread * aux_count_ * s.width, 0.f);
      std::fill_n(a.logits + first * s.vocab, (size_t)(a.shown - shown) * s.vocab, 0.f);
      std::fill_n(a.best + first, a.shown - shown, 0);
    }
  }

  void embed(const Row& row) {
    const float* frequencies[2] = {w.vector(SLOT_GLOBAL_FREQUENCIES), w.vector(SLOT_SLIDING_FREQUENCIES)};
    for (int m = row.first(count()); m < row.last(count()); m++) {
      const Token& token = tokens_[m];
      const int id = a.tokens[token.row * a.steps + token.place];
      if (id < s.vocab)
        w.look_up(SLOT_EMBED, id, x.row(m));
      else
        std::copy_n(a.media + (size_t)(id - s.vocab) * s.width, s.width, x.row(m));
      for (int kind = 0; kind < 2; kind++) angles_[kind].set(m, token.position, frequencies[kind]);
    }
  }

  // Norm 2 i stands before layer i, norm 2 i + 1 in it, the last one after all layers.
  void norm(const Row& row) {
    const int before = row.layer / 2, is_last = before == s.num_layers;
    const float* gain =
        w.vector(is_last ? SLOT_NORM : layer(before) + (row.layer % 2 ? SLOT_POST_NORM : SLOT_INPUT_NORM));
    const int reader = is_last ? SLOT_HEAD : layer(before) + (row.layer % 2 ? SLOT_GATE_UP : SLOT_QKV);
    thread_local std::vector<float> normal;
    normal.resize(s.width);
    for (int m = row.first(count()); m < row.last(count()); m++) {
      float *stream = x.row(m), *out = normal.data();
      if (row.layer)
        for (int i = 0; i < s.width; i++) stream[i] += part.row(m)[i];
      normalize(stream, gain, out, s.width, c.norm_eps);
      put(out, s.width, normed, m, w.matrix(reader).format);
      if (row.layer % 2) {
        // In float32: a lower precision chooses other experts.
        if (has_experts(before)) put(out, s.width, routed, m);
        continue;
      }
      const size_t place = tokens_[m].row * a.steps + tokens_[m].place;
      for (int i = 0; i < aux_count_; i++)
        if (aux_layers_[i] == before - 1) std::copy_n(stream, s.width, a.aux + (place * aux_count_ + i) * s.width);
      if (is_last) std::copy_n(out, s.width, a.hidden + place * s.width);
    }
  }

  // A unit is a head, of keys or of queries, of a batch row: act(batch row, head).
  template <class Act>
  void by_heads(const Row& row, int heads, Act act) const {
    const int units = heads * a.batch;
    for (int unit = row.first(units); unit < row.last(units); unit++) act(unit / heads, unit % heads);
  }

  // Calls act(m, token) for the tokens of a batch row.
  template <class Act>
  void by_tokens(int batch_row, Act act) const {
    for (int m = 0; m < count(); m++)
      if (tokens_[m].row == batch_row) act(m, tokens_[m]);
  }

  // A head's rows of the cache.
  Rows cached(int index, int batch_row, int head) const {
    const bool sliding = is_sliding(index);
    const int rows = sliding ? a.sliding_rows : a.global_rows;
    const size_t at = ((size_t)index_of_kind(index) * a.batch + batch_row) * kv_heads(index) + head;
    return {(sliding ? a.sliding_keys : a.global_keys) + at * s.head_dim * rows,
            (sliding ? a.sliding_values : a.global_values) + at * rows * padded(s.value_dim, LANES), rows};
  }

  // Where in a token's QKV the queries, the key and the value of a head of keys begin: rows of each chunk are some heads
  // of each.
  struct Parts {
    int queries, key, value;
  };
  Parts parts(int index, int kv_head) const {
    const int kv = kv_heads(index) / s.chunks, heads = s.heads / s.chunks, in_chunk = kv_head % kv;
    const int chunk = kv_head / kv * ((heads + kv) * s.head_dim + kv * s.value_dim), keys = chunk + heads * s.head_dim;
    return {chunk + in_chunk * (heads / kv) * s.head_dim, keys + in_chunk * s.head_dim,
            keys + kv * s.head_dim + in_chunk * s.value_dim};
  }

  void write_keys(int index, int batch_row, int head) {
    const Rows cache = cached(index, batch_row, head);
    const Parts at = parts(index, head);
    const size_t V_padded = padded(s.value_dim, LANES);
    by_tokens(batch_row, [&](int m, const Token& token) {
      float* key = qkv.row(m) + at.key;
      const float* value = qkv.row(m) + at.value;
      const int place = is_sliding(index) ? token.position % cache.count : token.position;
      angles_[is_sliding(index)].rotate(m, key);
      put_key(cache.keys, key, s.head_dim, place);
      for (int i = 0; i < s.value_dim; i++) cache.values[place * V_padded + i] = value[i] * c.value_scale;
    });
  }

  void attend_group(int index, int batch_row, int kv_head) {
    const int group = s.heads / kv_heads(index);
    attend_heads(index, batch_row, kv_head * group, (kv_head + 1) * group);
  }

  // Query heads [first, last), which have one head of keys.
  void attend_heads(int index, int batch_row, int first, int last) {
    const int group = s.heads / kv_heads(index), kv_head = first / group, Q = s.head_dim;
    const bool sliding = is_sliding(index);
    const int from = parts(index, kv_head).queries + first % group * Q;
    const size_t V = s.value_dim, V_padded = padded(V, LANES);
    const Rows cache = cached(index, batch_row, kv_head);
    const float* sinks = w.has(layer(index) + SLOT_SINK) ? w.vector(layer(index) + SLOT_SINK) : nullptr;
    thread_local std::vector<float> vectors, outputs;
    thread_local std::vector<Query> queries;
    const size_t most = (size_t)a.steps * (last - first);
    vectors.resize(most * Q), outputs.resize(most * V_padded), queries.clear();
    by_tokens(batch_row, [&](int m, const Token& token) {
      const int oldest = sliding ? std::max(0, token.position - s.window + 1) : 0;
      for (int head = first; head < last; head++) {
        const size_t number = queries.size();
        float *query = qkv.row(m) + from + (head - first) * Q, *vector = vectors.data() + number * Q;
        angles_[sliding].rotate(m, query);
        for (int i = 0; i < Q; i++) vector[i] = query[i] * scale_;
        queries.push_back({vector, outputs.data() + number * V_padded, sinks ? sinks[head] : -FLT_MAX, {}});
        see_ring(queries.back(), oldest, token.position + 1, cache.count);
      }
    });
    attend(queries.data(), (int)queries.size(), &cache, 1, Q, V_padded);
    const float* out = outputs.data();
    by_tokens(batch_row, [&](int m, const Token&) {
      for (int head = first; head < last; head++, out += V_padded) put_eights(out, V, attended.row(m) + head * V);
      if (first == 0) std::fill(attended.row(m) + s.heads * V, attended.row(m + 1), Precise{});
    });
  }

  int index_of_kind(int index) const {
    int before = 0;
    for (int i = 0; i < index; i++) before += is_sliding(i) == is_sliding(index);
    return before;
  }

  // Each token's experts and their weights; then all pairs sorted by expert.
  void top_k(const Row& row) {
    const float* bias = w.vector(layer(row.layer) + SLOT_ROUTER_BIAS);
    thread_local std::vector<int> counts, order;
    thread_local std::vector<float> weights, score;
    thread_local std::vector<char> taken;
    counts.assign(s.experts, 0), order.resize(s.experts);
    weights.resize(count() * s.chosen), score.resize(s.experts);
    for (int m = 0; m < count(); m++) {
      for (int e = 0; e < s.experts; e++) score[e] = 1.f / (1.f + std::exp(-scores.row(m)[e]));
      float total = 0;
      taken.assign(s.experts, 0);
      for (int i = 0; i < s.chosen; i++) {
        int top = -1;
        for (int e = 0; e < s.experts; e++)
          if (!taken[e] && (top < 0 || score[e] + bias[e] > score[top] + bias[top])) top = e;
        taken[top] = 1, counts[top]++;
        chosen_[m * s.chosen + i] = top, weights[m * s.chosen + i] = score[top], total += score[top];
      }
      for (int i = 0; i < s.chosen; i++) weights[m * s.chosen + i] /= total + 1e-20f;
    }
    int experts = 0, start = 0;
    for (int e = 0; e < s.experts; e++) {
      order[e] = start;
      if (counts[e]) active_[experts] = e, starts_[experts++] = start;
      start += counts[e];
    }
    active_count_ = experts, starts_[experts] = start;
    for (int m = 0; m < count(); m++)
      for (int i = 0; i < s.chosen; i++) pairs_[order[chosen_[m * s.chosen + i]]++] = {m, weights[m * s.chosen + i]};
    int moe = 0;
    for (int i = 0; i < row.layer; i++) moe += has_experts(i);
    std::copy(counts.begin(), counts.end(), a.expert_counts + moe * s.experts);
  }

  // All units of all active experts are shared equally.
  void expert_gate_up(const Row& row) {
    const Matrix any = slot(row, SLOT_GATE_UP);
    const int units = gated_units_of(any), all = units * active_count_, format = slot(row, SLOT_DOWN).format;
    thread_local std::vector<const Precise*> from;
    thread_local std::vector<float*> to;
    by_matrix(row.first(all), row.last(all), units, [&](int number, int first, int last) {
      const Matrix expert = w.matrix(layer(row.layer) + SLOT_GATE_UP, active_[number]);
      const int begin = starts_[number], end = starts_[number + 1];
      from.clear(), to.clear();
      for (int p = begin; p < end; p++) from.push_back(normed.row(pairs_[p].token)), to.push_back(expert_gated.row(p));
      multiply_units(expert, first, last, from, to, 2 * FEATURES);
      for (int p = begin; p < end; p++) swiglu(any, expert_gated.row(p), expert_hidden.row(p), first, last, format);
    });
  }

  // Experts are added up in their order, whoever else is active.
  void expert_down(const Row& row) {
    const int slot = layer(row.layer) + SLOT_DOWN, units = units_of(w.matrix(slot));
    const int first = row.first(units), last = row.last(units);
    const int begin = first * UNIT, end = std::min(last * UNIT, s.width), width = end - begin;
    thread_local std::vector<const Precise*> from;
    thread_local std::vector<float*> to;
    thread_local std::vector<float> sums;
    for (int m = 0; m < count(); m++) std::fill(part.row(m) + begin, part.row(m) + end, 0.f);
    for (int number = 0; number < active_count_; number++) {
      const int start = starts_[number], pairs = starts_[number + 1] - start;
      sums.resize((size_t)pairs * width), from.clear(), to.clear();
      for (int p = 0; p < pairs; p++)
        from.push_back(expert_hidden.row(start + p)), to.push_back(sums.data() + (size_t)p * width - begin);
      multiply_units(w.matrix(slot, active_[number]), first, last, from, to);
      for (int p = 0; p < pairs; p++) {
        const Pair& pair = pairs_[start + p];
        float* out = part.row(pair.token) + begin;
        for (int i = 0; i < width; i++) out[i] += pair.weight * sums[(size_t)p * width + i];
      }
    }
  }

  void head(const Row& row) {
    const Matrix matrix = w.matrix(SLOT_HEAD);
    const int first = row.first(units_of(matrix)), last = row.last(units_of(matrix));
    thread_local std::vector<const Precise*> from;
    thread_local std::vector<float*> to;
    from.clear(), to.clear();
    for (const Shown& shown : shown_)
      from.push_back(normed.row(shown.token)), to.push_back(a.logits + (size_t)shown.place * s.vocab);
    multiply_units(matrix, first, last, from, to);
    for (size_t i = 0; i < shown_.size(); i++)
      picks[i * MOST_SHARES + row.share] = best_of(to[i], first * UNIT, std::min(last * UNIT, s.vocab));
  }

  void pick(const Row& row) {
    const int count = (int)shown_.size(), shares = row.value;  // of the head's rows, that this one waited for
    for (int i = row.first(count); i < row.last(count); i++)
      a.best[shown_[i].place] = best_of_shares(picks + i * MOST_SHARES, shares).id;
  }

  const TargetSizes s;
  const TargetNumbers c{};
  const int32_t *layers_ = nullptr, *aux_layers_ = nullptr;
  const int aux_count_ = 0;
  const Weights w{};
  const TargetArrays a{};
  const float scale_ = s.head_dim ? 1.f / std::sqrt((float)s.head_dim) : 0.f;
  std::vector<Token> tokens_;
  std::vector<Shown> shown_;
  Floats x, part, qkv, gated, scores, routed, expert_gated;
  Inputs normed, attended, hidden, expert_hidden;
  Angles angles_[2];  // of global and of sliding layers
  Best* picks = nullptr;
  Pair* pairs_ = nullptr;
  int *active_ = nullptr, *starts_ = nullptr, *chosen_ = nullptr;
  int active_count_ = 0;
};
