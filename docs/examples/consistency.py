# %% [markdown]
# # What consistency does to a softmax
#
# The queue's keys, which are other images', give every image a distribution: the softmax of its similarities
# to them. CO2 asks that the query's distribution Q be that of the other view of its image, P. Here a tiny
# encoder learns from scikit-learn's scanned digits, once without that term and once with it.

# %%
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from contrastive_ops import KeyQueue, co2_loss, consistency_loss

torch.set_num_threads(1)
images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)


def view(images):
    """Each turned, moved and stretched a little, by chance."""
    pose = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(pose, images.shape, False), align_corners=False)


# %% [markdown]
# MoCo's loop, with the weight of the consistency term for an argument. Both trainings see the same views.


# %%
def train(consistency_weight):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64),
    )  # fmt: skip
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = KeyQueue(size=1024, dim=64)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _epoch in range(6):
        for batch in images[torch.randperm(len(images))].split(128):
            with torch.no_grad():
                for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
                    slow.lerp_(fast, 1 - 0.99)
            query, key = encoder(view(batch)), F.normalize(momentum_encoder(view(batch)), dim=1)
            loss = co2_loss(query, key, queue.keys, consistency_weight=consistency_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue.enqueue(key)
    return encoder.eval(), momentum_encoder.eval(), queue.keys


trained = {"InfoNCE alone": train(0.0), "with the consistency term": train(0.3)}

# %% [markdown]
# Afterwards both meet the same views of 512 images. `consistency_loss` is ½ KL(P‖Q) + ½ KL(Q‖P) of every
# image, for which it writes neither P nor Q; the picture will have both.

# %% tags=["measured"]
torch.manual_seed(1)
views = view(images[:512]), view(images[:512])

similarities, distances = {}, {}
for name, (encoder, momentum_encoder, keys) in trained.items():
    with torch.no_grad():
        query = F.normalize(encoder(views[0]), dim=1)
        key = F.normalize(momentum_encoder(views[1]), dim=1)
        similarities[name] = query @ keys.T, key @ keys.T
        distances[name] = consistency_loss(query, key, keys, temperature=0.05, reduction="none")
    print(f"{name:25}  mean {distances[name].mean():.2f}, median {distances[name].median():.2f}")

# %% [markdown]
# The picture has one image of them, the one that is the median without the term. The keys stand in the order
# of P, the most alike first.

# %%
image = distances["InfoNCE alone"].argsort()[256]
ranks = range(1, 41)

figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
for axes, (name, of_both) in zip(panels, similarities.items(), strict=True):
    q, p = ((each[image] / 0.05).softmax(dim=0) for each in of_both)
    nearest = p.topk(len(ranks)).indices
    axes.fill_between(ranks, p[nearest], step="mid", color="#dbe4ee")
    axes.step(ranks, p[nearest], where="mid", color="#3a6ea5", linewidth=1.5, label="P, the key's")
    axes.step(ranks, q[nearest], where="mid", color="#d1495b", linewidth=2.5, label="Q, the query's")
    axes.set_title(f"{name}: ½ KL(P‖Q) + ½ KL(Q‖P) = {distances[name][image]:.2f}", fontsize=10)
    axes.set_xlabel("keys of the queue, by their probability in P")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
panels[0].set_ylabel("probability")
figure.suptitle("What one image's two views find among the other images", weight="bold")
plt.show()

# %% [markdown]
# InfoNCE asks a query to be near its key and far from the queue, and says nothing about which images of the
# queue it is less far from. With the consistency term the key answers that question too, and the two answers
# are closer; part of that is that both are less sure. Whether features gain by it is a matter for
# [results](../results.md); [the losses](../losses.md) have the formula.
