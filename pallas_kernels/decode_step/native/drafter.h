// The drafter's rows. What it gets wrong costs time, never text: so it multiplies in bf16 where the machine can.
#pragma once

#include "attention.h"
#include "parts.h"

// The rings of all draft layers: keys [L][B][K][S/16][Q][16], values [L][B][K][S][V].
struct DraftCache {
  float *keys, *values;
  int rows;
};

// What every program of the drafter knows: its sizes, its weights, and where a head's rows of the cache lie.
struct DraftModel {
  DrafterSizes s;
  DrafterNumbers c;
  Weights w;
  DraftCache cache;
  int batch;

  int layer(int index) const { return DRAFT_TOP_SLOTS + DRAFT_LAYER_SLOTS * index; }
  size_t value_dims() const { return padded(s.head_dim, LANES); }
  size_t head_at(int index, int batch_row, int head) const {
    return ((size_t)index * batch + batch_row) * s.kv_heads + head;
  }
  float* keys(int index, int batch_row, int head) const {
    return cache.keys + head_at(index, batch_row, head) * cache.rows * s.head_dim;
  }
  float* values(int index, int batch_row, int head) const {
    return cache.values + head_at(index, batch_row, head) * cache.rows * value_dims();
  }
  // A query or a key, normalised and rotated.
  void ready(const float* x, const float* gain, const Angles& angles, size_t token, float* out) const {
    normalize(x, gain, out, s.head_dim, c.norm_eps);
    angles.rotate(token, out);
  }
};

// Fills a block of each row: the anchor's embedding and one learned vector per draft, through layers that also see the
// context; then a token for each draft, one after the other where a bias knows the token before.
struct DraftArrays {
  const int32_t *anchors, *lengths, *text;  // [B], [B], [B][lookup]
  float* logits;                            // [B][M][C]
  int32_t* tokens;                          // [B][M]
  float* likelihoods;                       // [B][M], of the tokens, each after those before it
  uint8_t* scratch;
};

class Draft {
 public:
  Draft(DraftModel model, Weights target, const DraftArrays& arrays) : d(model), target_(target), a(arrays) {
    Arena arena(a.scratch);
    reserve(arena);
  }

  static size_t scratch_bytes(const DrafterSizes& sizes, int batch) {
    Draft only(sizes, batch);
    Arena arena(nullptr);
    only.reserve(arena);
    return arena.used();
  }

  void operator()(const Row& row) {
    switch (row.kind) {
      case LOOK_UP: return look_up(row);
      case GUESS: return product(row, d.w.matrix(DRAFT_SLOT_GUESS), guesses, guessed, d.batch * drafts());
      case DRAFT_EMBED: return embed(row);
      case NORM: return norm(row);
      case QKV: return product(row, slot(row, DRAFT_SLOT_QKV), normed, qkv, count());
      case DRAFT_ATTEND: return attend_heads(row);
      case OUTPUT: return product(row, slot(row, DRAFT_SLOT_OUTPUT), attended, part, count());
      case GATE_UP:
        return gate_up(row, slot(row, DRAFT_SLOT_GATE_UP), slot(row, DRAFT_SLOT_DOWN), normed, gated, hidden, count());
      case DOWN: return product(row, slot(row, DRAFT_SLOT_DOWN), hidden, part, count());
      case HEAD: return head(row);
      case BIAS: return bias(row);
      case DRAFT_PICK: return pick(row);
    }
  }

 private:
  Draft(const DrafterSizes& sizes, int batch) : d{sizes, {}, {}, {}, batch} {}

  int drafts() const { return d.s.block - 1; }
  int count() const { return d.batch * d.s.block; }
  Matrix slot(const Row& row, int slot) const { return d.w.matrix(d.layer(row.layer) + slot); }
  float* logits(int batch_row, int draft) const {
    return a.logits + ((size_t)batch_row * drafts() + draft - 1) * d.s.target_vocab;
  }

  void reserve(Arena& arena) {
    const size_t tokens = count(), width = d.s.width;
    x = Floats::of(arena, tokens, width), part = Floats::of(arena, tokens, width);
    normed = Compacts::of(arena, tokens, width);
    qkv = Floats::of(arena, tokens, (d.s.heads + 2 * d.s.kv_heads) * d.s.head_dim);
    attended = Compacts::of(arena, tokens, d.s.heads * d.s.head_dim);
    gated = Floats::of(arena, tokens, 2 * padded(d.s.features, LANES));
    hidden = Compacts::of(arena, tokens, d.s.features);
    guesses = Compacts::of(arena, tokens, width), guessed = Floats::of(arena, tokens, width);
    biased = Floats::of(arena, d.batch, d.s.target_vocab);
    picks = arena.take<Best>(tokens * MOST_SHARES), masses = arena.take<float>(tokens * MOST_SHARES);
    matched = arena.take<int>(d.batch);
    angles = Angles(arena, tokens, d.s.rotary);
  }

  // What followed the latest of the longest earlier occurrences of the newest tokens.
  void look_up(const Row& row) {
    std::vector<float> embedded(d.s.width);
    std::vector<int> text(d.s.lookup + 1);
    for (int b = row.first(d.batch); b < row.last(d.batch); b++) {
      std::copy_n(a.text + (size_t)b * d.s.lookup, d.s.lookup, text.data());
      const int end = d.s.lookup;
      text[end] = a.anchors[b];
      int source = 0, longest = 0;
      for (int place = end - 1; place >= 0 && longest < d.s.longest_match; place--) {
        int length = 0;
        while (length < d.s.longest_match && length <= place && text[place - length] >= 0 &&
               text[place - length] == text[end - length])
          length++;
        if (length > longest) source = place, longest = length;
      }
      matched[b] = longest;
      for (int draft = 1; draft <= drafts(); draft++) {
        int column = source + draft;
        if (column > end) column = source + 1 + (draft - 1) % std::max(end - source, 1);
        std::fill(embedded.begin(), embedded.end(), 0.f);
        if (longest) target_.look_up(SLOT_EMBED, text[column], embedded.data());
        put(embedded.data(), d.s.width, guesses, b * drafts() + draft - 1);
      }
    }
  }

  void embed(const Row& row) {
    const float* mask = d.w.vector(DRAFT_SLOT_MASK);
    std::vector<float> trusted(d.s.width);
    for (int m = row.first(count()); m < row.last(count()); m++) {
      const int b = m / d.s.block, place = m % d.s.block;
      float* out = x.row(m);
      angles.set(m, a.lengths[b] + place, d.w.vector(DRAFT_SLOT_BLOCK_FREQUENCIES));
      if (!place) {
        target_.look_up(SLOT_EMBED, a.anchors[b], out);
        continue;
      }
      std::copy_n(mask, d.s.width, out);
      if (!d.s.lookup) continue;
      d.w.look_up(DRAFT_SLOT_MATCHED, matched[b], trusted.data());
      const float* guess = guessed.row(b * drafts() + place - 1);
      for (int i = 0; i < d.s.width; i++) out[i] += guess[i] + trusted[i];
    }
  }

  void norm(const Row& row) {
    const int before = row.layer / 2;
    const int norm = row.layer % 2 ? DRAFT_SLOT_POST_NORM : DRAFT_SLOT_INPUT_NORM;
    const float* gain = d.w.vector(before == d.s.num_layers ? (int)DRAFT_SLOT_NORM : d.layer(before) + norm);
    std::vector<float> out(d.s.width);
    for (int m = row.first(count()); m < row.last(count()); m++) {
      if (row.layer)
        for (int i = 0; i < d.s.width; i++) x.row(m)[i] += part.row(m)[i];
      normalize(x.row(m), gain, out.data(), d.s.width, d.c.norm_eps);
      put(out.data(), d.s.width, normed, m);
    }
  }

  void attend_heads(const Row& row) {
    const int units = d.batch * d.s.kv_heads;
    for (int unit = row.first(units); unit < row.last(units); unit++)
      attend_head(row.layer, unit / d.s.kv_heads, unit % d.s.kv_heads);
  }

  // The block's rows see the context, less than a window behind them, and each other.
  void attend_head(int index, int b, int head) {
    const int N = d.s.block, Q = d.s.head_dim, group = d.s.heads / d.s.kv_heads, start = a.lengths[b];
    const int V = (int)d.value_dims(), block_rows = (int)padded(N, LANES);
    const float *q_norm = d.w.vector(d.layer(index) + DRAFT_SLOT_Q_NORM),
                *k_norm = d.w.vector(d.layer(index) + DRAFT_SLOT_K_NORM);
    const float* sinks = d.s.has_sink ? d.w.vector(d.layer(index) + DRAFT_SLOT_SINK) : nullptr;
    std::vector<float> keys((size_t)block_rows * Q), values((size_t)block_rows * V), key(Q);
    std::vector<float> vectors((size_t)N * group * Q), outputs((size_t)N * group * V);
    std::vector<Query> queries;
    for (int n = 0; n < N; n++) {
      const float* from = qkv.row(b * N + n);
      d.ready(from + (d.s.heads + head) * Q, k_norm, angles, b * N + n, key.data());
      put_key(keys.data(), key.data(), Q, n);
      const float* value = from + (d.s.heads + d.s.kv_heads + head) * Q;
      for (int i = 0; i < Q; i++) values[(size_t)n * V + i] = value[i] * d.c.value_scale;
      for (int g = 0; g < group; g++) {
        const size_t number = queries.size();
        float* query = vectors.data() + number * Q;
        d.ready(from + (head * group + g) * Q, q_norm, angles, b * N + n, query);
        for (int i = 0; i < Q; i++) query[i] *= 1.f / std::sqrt((float)Q);
        queries.push_back({query, outputs.data() + number * V, sinks ? sinks[head * group + g] : -FLT_MAX, {}});
        const int first = std::max(0, start + n - d.s.window + 1);
        if (first < start) see_ring(queries.back(), first, start, d.cache.rows);
        queries.back().spans[2] = {d.cache.rows, d.cache.rows + N};
      }
    }
    const Rows sources[] = {{d.keys(index, b, head), d.values(index, b, head), d.cache.rows},
                            {keys.data(), values.data(), block_rows}};
    attend(queries.data(), (int)queries.size(), sources, 2, Q, V);
    for (int n = 0, number = 0; n < N; n++) {
      Compact* out = attended.row(b * N + n);
      for (int g = 0; g < group; g++, number++)
        put_eights(outputs.data() + (size_t)number * V, Q, out + (head * group + g) * Q);
      if (!head) std::fill(out + d.s.heads * Q, attended.row(b * N + n + 1), Compact(0));
    }
  }

  // The target's head, of the drafts alone; ids that the drafter does not know are impossible.
  void head(const Row& row) {
    const Matrix matrix = target_.matrix(SLOT_HEAD);
    const int first = row.first(units_of(matrix)), last = row.last(units_of(matrix));
    std::vector<const Compact*> from;
    std::vector<float*> to;
    for (int m = 0; m < count(); m++)
      if (m % d.s.block) from.push_back(normed.row(m)), to.push_back(logits(m / d.s.block, m % d.s.block));
    multiply_units(matrix, first, last, from, to);
    const int begin = first * UNIT, end = std::min(last * UNIT, d.s.target_vocab);
    for (size_t i = 0; i < to.size(); i++) {
      if (end > d.s.vocab) std::fill(to[i] + std::max(begin, d.s.vocab), to[i] + end, -INFINITY);
      const int b = (int)i / drafts(), draft = (int)i % drafts() + 1;
      if (!d.s.bias_rank) note(b, draft, row.share, to[i], begin, end);
    }
  }

  // What the token before adds to a draft's logits. The row waited for all shares of the draft before, so it knows it.
  void bias(const Row& row) {
    const Matrix matrix = d.w.matrix(DRAFT_SLOT_BIAS_OUT);
    const int first = row.first(units_of(matrix)), last = row.last(units_of(matrix)), draft = row.layer;
    std::vector<const Compact*> from;
    std::vector<float*> to;
    std::vector<float> embedded(d.s.bias_rank);
    const size_t stride = padded(d.s.bias_rank, GROUP);
    std::vector<Compact> inputs(stride * d.batch);
    for (int b = 0; b < d.batch; b++) {
      const int before = draft == 1 ? a.anchors[b] : best(b, draft - 1, row.value);
      d.w.look_up(DRAFT_SLOT_BIAS_IN, before, embedded.data());
      put(embedded.data(), d.s.bias_rank, Compacts{inputs.data(), stride}, b);
      from.push_back(inputs.data() + b * stride), to.push_back(biased.row(b));
    }
    multiply_units(matrix, first, last, from, to);
    const int begin = first * UNIT, end = std::min(last * UNIT, d.s.vocab);
    for (int b = 0; b < d.batch; b++) {
      for (int i = begin; i < end; i++) to[b][i] += logits(b, draft)[i];
      note(b, draft, row.share, to[b], begin, end);
    }
  }

  size_t picks_at(int batch_row, int draft) const { return ((size_t)batch_row * d.s.block + draft) * MOST_SHARES; }

  // What a share of the vocabulary has to say of a draft.
  void note(int batch_row, int draft, int share, const float* x, int first, int last) {
    const size_t at = picks_at(batch_row, draft) + share;
    picks[at] = best_of(x, first, last);
    masses[at] = mass_of(x, first, last, picks[at].value);
  }

  int best(int batch_row, int draft, int shares) const {
    return best_of_shares(picks + picks_at(batch_row, draft), shares).id;
  }

  float likelihood(int batch_row, int draft, int shares) const {
    const size_t at = picks_at(batch_row, draft);
    const float top = best_of_shares(picks + at, shares).value;
    float mass = 0;
    for (int share = 0; share < shares; share++)
      if (masses[at + share]) mass += masses[at + share] * std::exp(picks[at + share].value - top);
    return 1 / mass;
  }

  void pick(const Row& row) {
    for (int b = 0; b < d.batch; b++)
      for (int draft = 1; draft <= drafts(); draft++) {
        const size_t at = (size_t)b * drafts() + draft - 1;
        a.tokens[at] = best(b, draft, row.value), a.likelihoods[at] = likelihood(b, draft, row.value);
      }
  }

  const DraftModel d;
  const Weights target_{};
  const DraftArrays a{};
  Floats x, part, qkv, gated, guessed, biased;
  Compacts normed, attended, hidden, guesses;
  Angles angles;
  Best* picks = nullptr;
  float* masses = nullptr;
  int* matched = nullptr;
};

// What the target has read becomes context: its auxiliary hidden states, as keys and values of every draft layer.
struct ContextArrays {
  const float* aux;                 // [B][T][Z]
  const int32_t *lengths, *counts;  // [B]
  uint8_t* scratch;
  int steps, aux_width;
};

class Context {
 public:
  Context(DraftModel model, const ContextArrays& arrays) : d(model), a(arrays) {
    for (int b = 0; b < d.batch; b++)
      for (int t = 0; t < std::min(a.counts[b], a.steps); t++) tokens_.push_back({b, t, a.lengths[b] + t});
    Arena arena(a.scratch);
    reserve(arena, d.batch * a.steps, a.aux_width);
  }

  static size_t scratch_bytes(const DrafterSizes& sizes, int batch, int steps, int aux_width) {
    Context only(sizes, batch);
    Arena arena(nullptr);
    only.reserve(arena, batch * steps, aux_width);
    return arena.used();
  }

  bool is_idle() const { return tokens_.empty(); }

  void operator()(const Row& row) {
    switch (row.kind) {
      case TAKE: return take(row);
      case FUSE: return product(row, d.w.matrix(DRAFT_SLOT_FUSE), aux, x, count());
      case NORM: return norm(row);
      case CONTEXT: return project(row);
      case CONTEXT_WRITE: return write_heads(row);
    }
  }

 private:
  Context(const DrafterSizes& sizes, int batch) : d{sizes, {}, {}, {}, batch} {}

  int count() const { return (int)tokens_.size(); }
  int kv_rows() const { return 2 * d.s.kv_heads * d.s.head_dim; }

  void reserve(Arena& arena, size_t tokens, size_t aux_width) {
    aux = Compacts::of(arena, tokens, aux_width), normed = Compacts::of(arena, tokens, d.s.width);
    x = Floats::of(arena, tokens, d.s.width);
    projected = Floats::of(arena, tokens * d.s.num_layers, kv_rows());
    angles = Angles(arena, tokens, d.s.rotary);
  }

  void take(const Row& row) {
    for (int m = row.first(count()); m < row.last(count()); m++) {
      put(a.aux + ((size_t)tokens_[m].row * a.steps + tokens_[m].place) * a.aux_width, a.aux_width, aux, m);
      angles.set(m, tokens_[m].position, d.w.vector(DRAFT_SLOT_CONTEXT_FREQUENCIES));
    }
  }

  void norm(const Row& row) {
    std::vector<float> out(d.s.width);
    for (int m = row.first(count()); m < row.last(count()); m++) {
      normalize(x.row(m), d.w.vector(DRAFT_SLOT_CONTEXT_NORM), out.data(), d.s.width, d.c.norm_eps);
      put(out.data(), d.s.width, normed, m);
    }
  }

  // A unit is one of a layer's; of its projection only keys and values, which stand behind the queries.
  void project(const Row& row) {
    const int queries = d.s.heads * d.s.head_dim, units = (kv_rows() + UNIT - 1) / UNIT, all = units * d.s.num_layers;
    std::vector<const Compact*> from;
    std::vector<float*> to;
    by_matrix(row.first(all), row.last(all), units, [&](int index, int first, int last) {
      const Matrix matrix = d.w.matrix(d.layer(index) + DRAFT_SLOT_QKV);
      from.clear(), to.clear();
      for (int m = 0; m < count(); m++)
        from.push_back(normed.row(m)), to.push_back(projected.row(m * d.s.num_layers + index) - queries);
      const int block = queries / LANES;
      multiply(matrix, block + 2 * first, std::min(block + 2 * last, matrix.blocks()), from.data(), count(), to.data());
    });
  }

  void write_heads(const Row& row) {
    const int heads = d.s.kv_heads, units = heads * d.s.num_layers;
    std::vector<float> key(d.s.head_dim);
    for (int unit = row.first(units); unit < row.last(units); unit++) {
      const int index = unit / heads, head = unit % heads, Q = d.s.head_dim;
      for (int m = 0; m < count(); m++) {
        const int b = tokens_[m].row, place = tokens_[m].position % d.cache.rows;
        if (is_overwritten(m)) continue;
        const float* from = projected.row(m * d.s.num_layers + index);
        d.ready(from + head * Q, d.w.vector(d.layer(index) + DRAFT_SLOT_K_NORM), angles, m, key.data());
        put_key(d.keys(index, b, head), key.data(), Q, place);
        const float* value = from + (heads + head) * Q;
        float* out = d.values(index, b, head) + (size_t)place * d.value_dims();
        for (int i = 0; i < Q; i++) out[i] = value[i] * d.c.value_scale;
      }
    }
  }

  // Of more tokens than the ring holds, only the last stay.
  bool is_overwritten(int m) const {
    return tokens_[m].place + d.cache.rows < std::min(a.counts[tokens_[m].row], a.steps);
  }

  const DraftModel d;
  const ContextArrays a{};
  std::vector<Token> tokens_;
  Compacts aux, normed;
  Floats x, projected;
  Angles angles;
};
