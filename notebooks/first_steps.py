# %% [markdown]
# # First steps
#
# Three calls: `load`, `generate`, `stream`. Everything below runs on the bundled model, on a CPU, in seconds. It has
# 15.9 M parameters and was trained on Python source; it writes what looks like Python, and cannot program.

# %%
import matplotlib.pyplot as plt
import numpy as np

import mimo_jax as mimo

model = mimo.load()
print(f"{len(model.config.layer_pattern)} layers, {model.config.num_experts} experts, layout: {model.layout}")

# %% [markdown]
# A prompt, a strategy, a number of tokens. Greedy decoding takes the most likely token each time.

# %%
result = mimo.generate(model, "def fibonacci(n):\n", mimo.Greedy(), max_tokens=64)
print("def fibonacci(n):\n" + result.text)
print(f"\n{result.timing.tokens_per_second:,.0f} tokens/s, finished by {result.finish_reason}")

# %% [markdown]
# Sampled text depends on the seed and on nothing else: not on the batch it is generated in, not on the drafter's
# presence.

# %%
warm = mimo.Sampled(temperature=0.8, top_p=0.95)
prompts = [mimo.Request("class Stack:\n", warm, max_tokens=32, seed=seed) for seed in range(3)]
together = mimo.generate_batch(model, prompts)
alone = mimo.generate(model, prompts[2])
print(together[2].text)
print("\nthe same alone as in a batch of three:", alone.tokens == together[2].tokens)

# %% [markdown]
# `stream` yields the same text in pieces, as it is made. A text ends at a stop string, which is not part of it.

# %%
for piece in mimo.stream(model, "import os\n", mimo.Greedy(), max_tokens=48, stop=["\n\n"]):
    print(piece.text, end="", flush=True)

# %% [markdown]
# One level down is an ordinary Flax module: tokens in, logits out. `layout="dense"` holds plain float32 arrays, which
# is what one wants to look into. Below is what may follow `for i in range`, with the probability of each.

# %%
dense = mimo.load(layout="dense", draft="none")
tokens = np.array([dense.tokenizer.encode("for i in range")])
logits_BTC, features, _ = mimo.Backbone(dense.config).apply({"params": dense.params}, tokens)
probabilities_C = np.exp(logits_BTC[0, -1] - np.logaddexp.reduce(logits_BTC[0, -1]))
best = np.argsort(probabilities_C)[::-1][:12]

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.bar([repr(dense.tokenizer.decode([int(token)])) for token in best], probabilities_C[best])
axes.set(ylabel="probability", title="after 'for i in range'")
axes.tick_params(axis="x", rotation=45)
plt.show()
