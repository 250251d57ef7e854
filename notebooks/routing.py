# %% [markdown]
# # Routing: which experts, how evenly, and what a block touches
#
# Each layer with experts scores all of them for each token, takes the best few, and mixes their outputs. A bias per
# expert only selects: training moves it so that all experts are used. What matters for speed is how many *different*
# experts a block of eight tokens touches, because each is read from memory once.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import mimo_jax as mimo

model = mimo.load(layout="dense", draft="none")
config = model.config
experts, chosen = config.num_experts, config.experts_per_token
source = Path(mimo.__file__).with_name("generation.py").read_text()
tokens = np.array(model.tokenizer.encode(source, literal=True)[:512])

# %% [markdown]
# ## How evenly the experts are used
#
# Each row is a layer, each column an expert. Even use would be one colour.

# %%
_, features, _ = mimo.Backbone(config).apply({"params": model.params}, tokens[None])
counts_LE = np.asarray(features.expert_counts)
even = len(tokens) * chosen / experts

figure, axes = plt.subplots(figsize=(9, 2.5), layout="constrained")
image = axes.imshow(counts_LE / even, aspect="auto", cmap="viridis", vmin=0)
figure.colorbar(image, label="use, 1 is even")
axes.set(xlabel="expert", ylabel="layer with experts", title=f"{chosen} of {experts} experts per token")
plt.show()
print("busiest expert over the mean, by layer:", np.round(counts_LE.max(axis=1) / even, 2))

# %% [markdown]
# ## What a block touches
#
# Chosen independently and evenly, T tokens touch E (1 - (1 - k/E)^T) experts of a layer. The planner counts with
# that. Tokens of a text that stand together choose alike, so real blocks touch fewer.


# %%
@jax.jit
def read(params, block, cache):
    """A block after what the cache holds: tokens per expert in each layer, and the cache after it."""
    _, features, cache = mimo.Backbone(config).apply({"params": params}, block[None], cache)
    return features.expert_counts, cache


sizes, touched = (1, 2, 4, 8, 16), []
for size in sizes:
    cache, used = model.decoder.step.init_cache(1, 1024), []
    for start in range(0, 384, size):
        counts_LE, cache = read(model.params, tokens[start : start + size], cache)
        used.append((np.asarray(counts_LE) > 0).sum(axis=1).mean())
    touched.append(np.mean(used))
formula = [experts * (1 - (1 - chosen / experts) ** size) for size in sizes]

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(sizes, formula, "k--", label="chosen independently")
axes.plot(sizes, touched, "o-", label="this text")
axes.axhline(experts, color="lightgrey")
axes.set(xlabel="tokens of a block", ylabel="different experts of a layer", xscale="log", ylim=(0, None))
axes.set_xticks(sizes, sizes)
axes.legend()
plt.show()
