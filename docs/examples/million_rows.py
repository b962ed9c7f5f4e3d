# %% [markdown]
# # A million rows on disk
#
# A classifier with a row of 128 numbers for each of a million images, and SGD with momentum and weight decay
# on all of them. Weight, momentum and gradient would be 1.4 GiB in memory. Here they stay on disk, but for
# the 2,048 rows that are active.

# %%
import tempfile
from pathlib import Path
from time import process_time

import torch

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss

torch.manual_seed(0)
torch.set_num_threads(1)

N, D = 1_000_000, 128
folder = tempfile.TemporaryDirectory()
classifier = InstanceClassifier(N, D, active=2048, storage="disk", path=folder.name)
optimizer = DelayedSGD(classifier, lr=0.06, momentum=0.9, weight_decay=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

# %% [markdown]
# A row that was never active takes no space, for its first value is computed from the seed and the image's
# number. So the folder of a million rows is nearly empty.


# %% tags=["measured"]
def mebibytes():
    """The size of the folder's files. Checkpoints share files, by hard links, which count once."""
    sizes = {file.stat().st_ino: file.stat().st_size for file in Path(folder.name).rglob("*")}
    return sum(sizes.values()) / 2**20


print(
    f"in the folder: {mebibytes():.1f} MiB, of {2 * N * D * 4 / 2**20:.1f} with all rows and their momentum"
)

# %% [markdown]
# ## Training
#
# These are the lines of a training loop. Random numbers stand for the two views of each image, which an
# encoder would give. `activate` makes the batch's rows active, in the places of those that were sampled
# earliest.


# %%
def train(steps):
    """The learning rate of each step, and the images whose rows were active in any of them."""
    rates, active = [], set()
    for _ in range(steps):
        indices = torch.randint(N, (256,))
        target = classifier.activate(indices)
        active.update(classifier.active_instances.tolist())
        views = torch.randn(2, 256, D)
        loss = conic_loss(views, classifier.weight, target, num_instances=N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates += schedule.get_last_lr()
        schedule.step()
    return rates, active


first = classifier.active_instances[:1]
_, active = train(20)
print(
    f"{len(active):,} of {N:,} rows took part in 20 steps: 2,048 in the first, and then at most 256 new ones"
)
print(f"the row of image {first.item():,} is active: {first.item() in classifier.active_instances.tolist()}")

# %% [markdown]
# That row was active at the beginning, and had a gradient in every step until others took its place. It keeps
# the momentum of these gradients.

# %%
weight, momentum = classifier.read(first)
print(f"norm of the weight {weight.norm():.3f}, of the momentum {momentum.norm():.3f}")

# %% [markdown]
# ## A row that nobody touches
#
# Dense SGD would move that row in every step to come, by its momentum and by weight decay. So does this
# optimiser, but late: it remembers the steps, and takes them when the row is wanted.

# %% tags=["measured"]
start = process_time()
rates, active = train(80)
print(f"{1000 * (process_time() - start) / len(rates):.1f} ms of the processor in a step")

# %% [markdown]
# Here are the same steps by dense SGD's formula, in float64 and one after the other:

# %%
assert first.item() not in active

w, v = weight.double(), momentum.double()
for rate in rates:
    v = 0.9 * v + 1e-3 * w
    w = w - rate * v

late_weight, late_momentum = classifier.read(first)
torch.testing.assert_close(late_weight.double(), w, rtol=1e-6, atol=1e-8)
torch.testing.assert_close(late_momentum.double(), v, rtol=1e-6, atol=1e-8)
moved = (late_weight - weight).norm()
print(f"{len(rates)} steps moved the weight by {moved:.3f}, to a norm of {late_weight.norm():.3f}")

# %% tags=["measured"]
print(f"relative distance from the formula's weight: {(late_weight - w).norm() / w.norm():.0e}")

# %% [markdown]
# `activate` would bring the row up to now in the same way, and have it trained again.
#
# A checkpoint writes to disk what still waits in memory. Then the folder has all rows that were active and no
# longer are, 1 KiB each.

# %% tags=["measured"]
state = classifier.state_dict()
print(f"in the folder: {mebibytes():.1f} MiB")

# %%
classifier.close()
folder.cleanup()

# %% [markdown]
# [A classifier of a billion rows](../instances.md) tells how rows of any age are caught up at once, what
# checkpoints on disk promise, and how several processes share the rows.
