# %% [markdown]
# # What a drafted round does
#
# The drafter fills a block of eight: the anchor, which is the newest token, and seven drafts after it, all in one
# forward pass. The target reads the block in one pass, keeps the drafts it agrees with, and adds a token of its own.
# So a round yields one token at worst and eight at best, and the text is the target's, whatever was drafted.

# %%
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.text import Text

import mimo_jax as mimo
from mimo_jax.decode import loop
from mimo_jax.decode.controls import Controls, stops_of
from mimo_jax.decode.sampling import rows_of

model = mimo.load(layout="dense", draft="dflash")
PROMPT = "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
GREEDY, WARM = (Controls(rows_of([strategy]), stops_of([()])) for strategy in (mimo.Greedy(), mimo.Sampled(0.7)))


def begin(controls: Controls, max_tokens: int) -> loop.State:
    """The prompt read, and the first token drawn."""
    ids = model.tokenizer.encode(PROMPT)
    caches = loop.prefill(model.decoder, model.weights, [ids], loop.capacity_for(len(ids) + max_tokens))
    return loop.start(model.decoder, *caches, np.array([max_tokens], np.int32), loop.row_keys([0]), controls)


# %% [markdown]
# ## A round by hand
#
# `propose` is the drafter alone. A whole round is `decode` with a budget of one. Drafts that the target did not keep
# are struck through; the token after the kept ones is the target's own.

# %%
console = Console(width=120, force_terminal=True)
state = begin(GREEDY, max_tokens=96)
for number in range(1, 7):
    drafts = loop.propose(model.decoder, model.weights, state, GREEDY).tokens[0].tolist()
    before = int(state.counts[0])
    state = loop.decode(model.decoder, model.weights, state, GREEDY, 1)
    made = state.output[0, before : int(state.counts[0])].tolist()
    line = Text(f"round {number}: ")
    for place, token in enumerate(drafts):
        is_kept = place < len(made) - 1
        line.append(repr(model.tokenizer.decode([token]))[1:-1], style="green" if is_kept else "red strike")
    line.append("  then  ").append(repr(model.tokenizer.decode(made[-1:]))[1:-1], style="bold blue")
    console.print(line)

# %% [markdown]
# ## A text, coloured by where its tokens come from
#
# Green tokens were drafted, blue ones the target's own. `State.rounds` has the round of each token: the last token of
# a round is always the target's.

# %%
state = loop.decode(model.decoder, model.weights, begin(WARM, max_tokens=96), WARM, 96)
count = int(state.counts[0])
tokens, rounds = state.output[0, :count].tolist(), state.rounds[0, :count].tolist()
text = Text(PROMPT, style="dim")
for token, this, following in zip(tokens, rounds, [*rounds[1:], None]):
    text.append(model.tokenizer.decode([token]), style="green" if this == following else "bold blue")
console.print(text)
print(f"{count} tokens in {max(rounds)} rounds")

# %% [markdown]
# ## The same text without a drafter
#
# Lossless means: not similar, the same.

# %%
plain = mimo.load(layout="dense", draft="none")
same = mimo.generate(plain, PROMPT, mimo.Greedy(), max_tokens=96).tokens
print("the same as plain decoding:", same == mimo.generate(model, PROMPT, mimo.Greedy(), max_tokens=96).tokens)

# %% [markdown]
# ## Acceptance by slot
#
# How often a draft is kept if all before it were, over some prompts. Later slots are harder: the drafter has not seen
# what stands between. At a higher temperature the target itself knows less about what it will say.

# %%
STARTS = ["def ", "import ", "class ", "for i in ", "return ", "try:\n    ", "if __name__ ==", "with open("]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for temperature in (0.0, 0.7, 1.0):
    strategy = mimo.Sampled(temperature) if temperature else mimo.Greedy()
    found = [result.acceptance for result in mimo.generate_batch(model, STARTS, strategy, max_tokens=48)]
    tested = np.sum([one.tested for one in found], axis=0)
    accepted = np.sum([one.accepted for one in found], axis=0)
    per_round = sum(one.tokens for one in found) / sum(one.rounds for one in found)
    axes.plot(range(1, 8), accepted / np.maximum(tested, 1), marker=".", label=f"T = {temperature}: {per_round:.2f}")
axes.set(xlabel="draft position", ylabel="kept, if all before were", ylim=(0, 1.02))
axes.legend(title="tokens per round")
plt.show()
