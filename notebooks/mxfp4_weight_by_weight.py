# %% [markdown]
# # MXFP4 and QAT, weight by weight
#
# MXFP4 stores 32 weights as 32 four-bit elements and one shared scale, a power of two: 4.25 bits per weight. An
# element is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Quantisation-aware training (QAT) lets the model
# learn, while it trains, to which of its two neighbours each weight is rounded.

# %%
import dataclasses
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import mimo_jax
from mimo_jax import ModelConfig
from mimo_jax.loading import BUNDLED
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.pretraining import TrainConfig, init_state, train_step
from mimo_jax.training.qat import begin, divergence, qat_step, quantize_experts, shifted
from pallas_kernels import mxfp4

# %% [markdown]
# ## One block
#
# Grey lines are the values that the block can hold with its scale; a weight goes to the nearest. The largest weight
# decides the scale, so a block with one large weight is coarse for all others.

# %%
rng = np.random.default_rng(0)
block = rng.normal(0, 0.02, (1, 32)).astype(np.float32)
codes, scales = mxfp4.quantize(block)
rounded = mxfp4.decode(codes, scales)
levels = np.unique(mxfp4.decode(np.arange(32, dtype=np.uint8)[None] % 16, scales))

figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
axes.hlines(levels, -0.5, 31.5, color="lightgrey", linewidth=0.8)
axes.vlines(range(32), block[0], rounded[0], color="C1", linewidth=1)
axes.plot(block[0], "o", markersize=4, label="weight")
axes.plot(rounded[0], "_", markersize=9, color="C1", label="rounded")
axes.set(xlabel="weight", title=f"scale 2^{int(scales[0, 0]) - 127}; error {np.std(rounded - block) / block.std():.0%}")
axes.legend()
plt.show()

# %% [markdown]
# ## The three rules for a scale
#
# They differ where the largest weight would be clipped: `floor` (the standard's) clips most, `ceil6` never, `even`
# little.

# %%
weights = rng.normal(0, 0.02, (4096, 32)).astype(np.float32)
for rule in mxfp4.SCALE_RULES:
    codes, scales = mxfp4.quantize(weights, rule)
    error = np.std(mxfp4.decode(codes, scales) - weights) / weights.std()
    clipped = np.mean(np.max(np.abs(weights), axis=-1) > 6 * np.exp2(scales[:, 0] - 127.0))
    print(f"{rule:<6} error {error:.2%}, blocks whose largest weight is clipped: {clipped:.1%}")

# %% [markdown]
# ## QAT of a model of a few layers
#
# It is trained on one file of this project for some steps, then rounded. The text is short and soon known by heart:
# what is to be seen is the rounding. Every expert weight gets an offset, added before it is rounded, and the offsets
# learn to bring the rounded model's predictions to those of the masters.

# %%
tokenizer = Tokenizer.load(BUNDLED / "tokenizer.json")
source = Path(mimo_jax.__file__).with_name("generation.py").read_text()
text = np.array(tokenizer.encode(source, literal=True), np.int32)
config = ModelConfig(
    vocab_size=4096,
    hidden_size=64,
    layer_pattern=(0, 1),
    moe_pattern=(0, 1),
    num_heads=4,
    num_kv_heads=2,
    sliding_num_kv_heads=2,
    head_dim=16,
    v_head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=128,
    num_experts=8,
    experts_per_token=2,
    partial_rotary_factor=0.5,
    rope_theta=1e4,
    sliding_rope_theta=1e4,
    sliding_window=32,
    max_position=256,
    dtype="float32",
)
train = TrainConfig(batch=8, length=64, warmup=10, peak_rate=8e-3, decay_start=180, decay_steps=60)
fine = dataclasses.replace(train, peak_rate=2e-4, decay_start=240)  # QAT: a small rate that falls to zero once more
WINDOWS = [
    np.stack([text[start : start + 65] for start in rng.integers(0, len(text) - 65, train.batch)]) for _ in range(300)
]


# %%
state = init_state(config, train)
for window in WINDOWS[:240]:
    state, metrics = train_step(state, window, config, train)
print(f"after 240 steps: {float(metrics['loss']):.2f} nats per token")

qat, losses = begin(state, fine), []
for window in WINDOWS[240:]:
    qat, metrics = qat_step(qat, window, config, fine)
    losses.append(float(metrics["rounding_loss"]))


# %%
@jax.jit
def distance(params, masters):
    """Of two models' predictions on the last windows, in nats per token."""
    first, second = (Backbone(config).apply({"params": one}, WINDOWS[-1][:, :-1])[0] for one in (masters, params))
    return divergence(first, second).mean()


masters = qat.masters.params
plain = float(distance(quantize_experts(masters), masters))
trained = float(distance(quantize_experts(qat.params), masters))
print(f"KL to the masters: rounded plainly {plain:.5f}, as QAT learnt {trained:.5f} nats per token")

# %% [markdown]
# ## Which weights went the other way
#
# Between two values a weight has a way of half a step to the nearer one, at most. Most of those that turned stood near
# the middle, where turning costs least. (Between 2 and 6 values lie two and four times as far apart.)

# %%
master = np.asarray(masters["layers_1"]["moe"]["gate"]).reshape(-1, 32)
moved = np.asarray(shifted(masters, qat.offsets)["layers_1"]["moe"]["gate"]).reshape(-1, 32)
_, scales = mxfp4.quantize(master)
step_size = np.exp2(scales.astype(np.float32) - 127) / 2
before, after = (mxfp4.decode(*mxfp4.quantize(one)) for one in (master, moved))
turned = before != after
from_nearest = np.abs(master - before) / step_size

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.plot(losses)
left.set(xlabel="step of QAT", ylabel="nats per token", title="rounded model from its masters", ylim=(0, None))
right.hist([from_nearest[~turned], from_nearest[turned]], bins=20, range=(0, 1), stacked=True, label=["kept", "turned"])
right.set(xlabel="distance to the nearest value, in half element steps", title=f"{turned.mean():.1%} of weights turned")
right.set_yscale("log")
right.legend()
plt.show()
