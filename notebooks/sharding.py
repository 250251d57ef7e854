# %% [markdown]
# # Sharding on eight simulated devices
#
# A mesh names its devices, a table maps the axes of parameters to the axes of the mesh, and the compiler does the
# rest. Eight CPU devices stand for eight GPUs here; the programs are the ones that GPUs would run, transfers
# included.

# %%
import collections

import jax
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)  # before anything runs

import mimo_jax as mimo  # noqa: E402
from mimo_jax.planning import hlo  # noqa: E402
from mimo_jax.sharding import MESH_AXES, MeshShape, make_mesh, parameter_axes, place  # noqa: E402

mesh = make_mesh(MeshShape(tensor=8))
model = mimo.load(mesh=mesh, layout="dense", draft="none")
print(mesh)

# %% [markdown]
# ## Who holds what
#
# For each kind of parameter: its axes, the axis that is split, and how much of it one device holds.

# %%
held = collections.defaultdict(lambda: [0, 0, ""])
for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    name = ".".join(part for part in names if not part.startswith("layers_"))
    split = [axis for axis in parameter_axes(names) if axis in MESH_AXES and leaf.sharding.spec != ()]
    entry = held[name]
    entry[0] += leaf.nbytes
    entry[1] += leaf.addressable_shards[0].data.nbytes
    entry[2] = ", ".join(split) if entry[1] < entry[0] else "whole everywhere"
print(f"{'parameter':<28}{'all, kB':>9}{'one device':>12}  split along")
for name, (total, own, split) in sorted(held.items(), key=lambda item: -item[1][0]):
    if total > 20_000:
        print(f"{name:<28}{total / 1e3:9.1f}{own / 1e3:12.1f}  {split}")

# %% [markdown]
# A picture of one matrix: which device holds which rows of the first layer's attention output.

# %%
weight = model.params["layers_0"]["attention"]["o"]
owner = np.zeros(weight.shape)
for shard in weight.addressable_shards:
    owner[shard.index] = shard.device.id

figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
image = axes.imshow(owner, cmap="tab10", vmax=9, aspect="auto")
figure.colorbar(image, label="device", ticks=range(8))
axes.set(title="attention output [D, heads x width]", xlabel="input", ylabel="output")
plt.show()

# %% [markdown]
# ## What is sent
#
# The compiled step of one token, and what it exchanges: in each layer two sums over devices, after attention and
# after the FFN, and a gather of the router's scores. A sum carries one vector of the residual stream, so it is small,
# and its cost is that of starting it. That is why the persistent kernel does it itself.

# %%
step = model.decoder.step
cache = place(step.init_cache(1, 256), mesh)
compiled = jax.jit(step).lower(model.params, np.zeros((1, 1), np.int32), cache, np.ones(1, np.int32)).compile()
sent = collections.Counter()
for one in hlo.executed(compiled.as_text()):
    if hlo.is_collective(one.instruction):
        sent[one.instruction.opcode, hlo.result_shape(one.instruction)] += 1
for (kind, shape), count in sent.most_common():
    print(f"{count:3} x {kind:<12} {shape}")

# %% [markdown]
# ## The text is the same

# %%
single = mimo.load(layout="dense", draft="none")
text = mimo.generate(single, "def main():\n", mimo.Greedy(), max_tokens=32).text
print("one device and eight agree:", mimo.generate(model, "def main():\n", mimo.Greedy(), max_tokens=32).text == text)
