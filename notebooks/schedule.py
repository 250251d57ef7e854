# %% [markdown]
# # The fused step's schedule as a picture
#
# A decode round is a table of work: rows with what they wait for and what they signal. The same phases are split for
# the threads of a CPU and for the SMs of a GPU. There is no launch between rows: a row waits for data and for nothing
# else. A validator says whether a table is safe, a simulator how long it takes. All times below are *projected*.

# %%
import collections
import dataclasses
import math

import matplotlib.pyplot as plt

from mimo_jax.config.geometry import target_of
from mimo_jax.config.presets import preset
from mimo_jax.loading import BUNDLED, read_hf_config
from mimo_jax.planning.timeline import draw_lanes
from pallas_kernels.decode_step import HOPPER, assigned_rows, shard_of, step_phases, timeline_of
from pallas_kernels.decode_step.schedule import claimed_rows
from pallas_kernels.decode_step.simulate import CPU
from pallas_kernels.decode_step.validate import validate


def draw(timeline, lanes, names, title, until=math.inf):
    """A bar per row, coloured by what it does."""
    axes = plt.figure(figsize=(11, 1.5 + 0.3 * len(lanes)), layout="constrained").subplots()
    draw_lanes(axes, timeline, lanes, names, until)
    axes.set(title=title)
    plt.show()


# %% [markdown]
# ## The bundled model on two CPU threads
#
# A phase begins when the one before it is complete; threads claim rows in order. So a thread that comes late takes
# fewer.

# %%
config, _ = read_hf_config(BUNDLED)
rows = claimed_rows(step_phases(target_of(config), tokens=8))
print(f"{len(rows)} rows for a block of 8; safe: {validate(rows) is None}")
for row in rows[:6]:
    share = f"share {row.share + 1} of {row.shares}"
    print(f"  {row.kind.name:<8} layer {row.layer}, {share}: waits {row.waits}, signals {row.signals}")

threads = timeline_of(rows, CPU)
lanes = sorted(set(threads.workers))
names = [f"thread {number}" for number in range(len(lanes))]
draw(threads, lanes, names, f"a block of 8 in {threads.round:.0f} us")

# %% [markdown]
# ## What a validator is for
#
# One wait too few, and a row may read what is not there yet. On a real machine that is a fault that shows once a
# week.

# %%
broken = list(rows)
victim = next(index for index, row in enumerate(rows) if row.kind.name == "ATTEND")
broken[victim] = dataclasses.replace(rows[victim], waits=())
print(validate(broken))

# %% [markdown]
# ## MiMo-V2.5-Pro on eight H200s, SM by SM
#
# Four layers of the model. Each SM runs four roles at once: one warp fills a ring with weights, far ahead of what is
# computed; one fetches inputs; one sends sums to the other devices; the others compute. Two devices are simulated,
# which shows every wait for a peer.

# %%
pro = target_of(preset("mimo-v2.5-pro"))
four = dataclasses.replace(pro, layers=pro.layers[:4])
sms = timeline_of(assigned_rows(step_phases(shard_of(four, 8), tokens=8), devices=2), HOPPER)
lanes = [(0, sm, role) for sm in (0, 1) for role in ("weights", "fetch", "consume", "send")]
names = [f"SM {sm} {role}" for _, sm, role in lanes]
draw(sms, lanes, names, f"{len(sms.rows):,} rows; {sms.round:.0f} us with embedding and head", until=320)

# %% [markdown]
# ## The chain that a round's length is made of
#
# Most rows could take longer without anybody noticing. Along one chain they could not. It says what to work on.

# %%
total = collections.Counter()
for parts in sms.exposed().values():
    total.update(parts)
names, times = zip(*total.most_common(10))
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.barh(names[::-1], times[::-1])
axes.set(xlabel="us of the chain (projected)")
plt.show()
