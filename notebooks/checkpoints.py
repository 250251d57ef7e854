# %% [markdown]
# # From a Hugging Face folder to Orbax and back
#
# Published checkpoints are folders of safetensors; Orbax is what JAX restores, onto any mesh. Conversion moves packed
# bytes as they are: nothing is decoded and rounded again. Everything written has a manifest of digests.

# %%
import contextlib
import io
import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import mimo_jax as mimo
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import PUBLISHED
from mimo_jax.errors import UserError
from mimo_jax.weights.params import array_bytes, weights

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What the published folder holds

# %%
for path in sorted(mimo.BUNDLED.rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size:>10,}  {path.relative_to(mimo.BUNDLED)}")
config = json.loads((mimo.BUNDLED / "config.json").read_text())
print(json.dumps(config["quantization_config"], indent=1)[:600])

# %% [markdown]
# Bytes by kind of weight. Experts are most of the model, and have four bits each.

# %%
found = read(mimo.BUNDLED)
by_kind: dict[str, int] = {}
for weight in weights(found.config, PUBLISHED):
    by_kind[weight.row.kind] = by_kind.get(weight.row.kind, 0) + array_bytes([weight])

figure, axes = plt.subplots(figsize=(7, 2.5), layout="constrained")
axes.barh(list(by_kind), [nbytes / 1e6 for nbytes in by_kind.values()])
axes.set(xlabel="MB in the files")
plt.show()

# %% [markdown]
# ## There and back

# %%
report = to_orbax(mimo.BUNDLED, folder / "orbax")
to_huggingface(folder / "orbax", folder / "again")
print({name: report[name] for name in ("storage", "qkv_layout", "probed_heads", "tensors")})
print(verify(folder / "again"))

first, again = read(mimo.BUNDLED), read(folder / "again")
same = jax.tree.map(lambda one, other: np.array_equal(one, other), first.params, again.params)
print("every array bit for bit the same:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## One flipped bit
#
# `verify` reads everything and names the first thing that is not as it was written.

# %%
victim = folder / "again" / "model-00001-of-00001.safetensors"
content = bytearray(victim.read_bytes())
content[-1] ^= 1
victim.write_bytes(content)
try:
    verify(folder / "again")
except UserError as error:
    print("refused:", str(error).replace(str(folder), "…"))

# %% [markdown]
# ## Either kind is a model

# %%
with contextlib.redirect_stderr(io.StringIO()):
    texts = {
        name: mimo.generate(mimo.load(path), "import ", mimo.Greedy(), max_tokens=12).text
        for name, path in (("published", mimo.BUNDLED), ("Orbax", folder / "orbax"))
    }
print(texts)
