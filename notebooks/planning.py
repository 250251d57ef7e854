# %% [markdown]
# # Planning a machine that one does not have
#
# What a device holds and reads follows from shapes alone, so it can be counted without the device. Bytes below are
# exact; times are *projected* from peak figures of data sheets and a stated range of efficiency.

# %%
import matplotlib.pyplot as plt
import numpy as np

from mimo_jax.config.presets import drafter_preset, preset, preset_format
from mimo_jax.planning import forecast, report
from mimo_jax.planning.machines import parse_target
from mimo_jax.planning.traffic import Plan, cache_bytes, mesh_shape_for, resident_weights, round_reads

PRO = "mimo-v2.5-pro"


def plan_of(target, groups=1):
    """MiMo-V2.5-Pro on a machine, as published: experts in MXFP4, a drafter of blocks of eight."""
    config = preset(PRO)
    shape = mesh_shape_for(config, target.count, groups)
    return Plan(config, preset_format(PRO), drafter_preset(PRO), shape, cache_itemsize=2)


# %% [markdown]
# ## One node of eight H200

# %%
h200 = parse_target("8xh200")
plan = plan_of(h200)
print(report.text_of(report.record_of(plan, h200, 131_072, {})))

# %% [markdown]
# ## What a round reads
#
# Outside the experts, a block of eight tokens reads what a single one does. Of the experts it reads more, since its
# tokens choose different ones, but fewer than eight times as many. A round pays as soon as it yields more tokens than
# it reads more bytes.

# %%
tokens = [1, 2, 4, 8, 16, 32]
reads = [round_reads(plan, count, 131_072, False) for count in tokens]
names = sorted(reads[0], key=lambda name: -reads[-1][name])

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
bottom = np.zeros(len(tokens))
for name in names:
    part = np.array([read[name] for read in reads]) / 1e9
    axes.bar(range(len(tokens)), part, bottom=bottom, label=name)
    bottom += part
axes.set_xticks(range(len(tokens)), tokens)
axes.set(xlabel="tokens per round", ylabel="GB per device")
axes.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Machines beside each other
#
# Projected tokens per second of one text, between the two bounds of `forecast.BOUNDS`, by tokens per round.

# %%
accepted = np.linspace(1.001, 8, 30)
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for index, name in enumerate(("8xh100", "8xh200", "8xb200")):
    target = parse_target(name)
    planned = plan_of(target)
    need = sum(resident_weights(planned).values()) + cache_bytes(planned, 131_072)
    fits = "" if need < target.gpu.memory else f", does not fit: {need / 1e9:.0f} GB of {target.gpu.memory / 1e9:.0f}"
    low, high = (
        [forecast.tokens_per_second(planned, target, 131_072, one, forecast.BOUNDS[bound]) for one in accepted]
        for bound in ("low", "high")
    )
    axes.fill_between(accepted, low, high, alpha=0.3, color=f"C{index}", label=f"{target}{fits}")
axes.axhline(1000, color="grey", linewidth=0.8)
axes.set(xlabel="tokens per round", ylabel="tokens/s, projected", title="128k tokens of context", ylim=(0, None))
axes.legend(fontsize="small")
plt.show()
