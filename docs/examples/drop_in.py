# %% [markdown]
# # Beside the eager loss
#
# The lines that MoCo's training loops have for CO2, and the call that takes their place: the same loss, the
# same gradient, and what both cost on the machine that ran this page.

# %%
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F

from contrastive_ops import co2_loss
from train_ref.memory import PeakMemory

torch.manual_seed(0)
torch.set_num_threads(1)

query = torch.randn(128, 128, requires_grad=True)  # what an encoder gives
key = F.normalize(query.detach() + 0.5 * torch.randn(128, 128), dim=1)  # by the momentum encoder
queue = F.normalize(torch.randn(65536, 128), dim=1)

# %% [markdown]
# InfoNCE over the queue, and the consistency term: the softmax of the query's similarities to the queue shall
# be that of the key's. Nearly every line makes another matrix of 128 × 65,536 numbers, which are 32 MiB, and
# autograd keeps most of them.


# %%
def eager_loss(query, key, queue, temperature=0.2, consistency_temperature=0.05, consistency_weight=0.3):
    query = F.normalize(query, dim=1)
    positive = (query * key).sum(dim=1, keepdim=True)
    similarities = query @ queue.T
    logits = torch.cat([positive, similarities], dim=1) / temperature
    contrast = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    log_q = F.log_softmax(similarities / consistency_temperature, dim=1)
    log_p = F.log_softmax(key @ queue.T / consistency_temperature, dim=1)
    p_to_q = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    q_to_p = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return contrast + consistency_weight * (p_to_q + q_to_p) / 2


# %% [markdown]
# `co2_loss` has the same defaults, which are the CO2 paper's for MoCo v2.


# %%
def loss_and_gradient(loss, *tensors):
    value = loss(*tensors)
    (gradient,) = torch.autograd.grad(value, tensors[0])
    return value.detach(), gradient


losses = {"eager PyTorch": eager_loss, "co2_loss": co2_loss}
results = {name: loss_and_gradient(loss, query, key, queue) for name, loss in losses.items()}

for name, (value, gradient) in results.items():
    print(f"{name:13}  loss {value:.4f}, gradient's norm {gradient.norm():.5f}")
torch.testing.assert_close(results["co2_loss"], results["eager PyTorch"])

# %% [markdown]
# Eager PyTorch in float64 tells how much of either is rounding.

# %% tags=["measured"]
exact_value, exact_gradient = loss_and_gradient(eager_loss, query.double(), key.double(), queue.double())

for name, (value, gradient) in results.items():
    in_value = (value - exact_value).abs() / exact_value
    in_gradient = (gradient - exact_gradient).norm() / exact_gradient.norm()
    print(f"{name:13}  relative error of the loss {in_value:.0e}, of the gradient {in_gradient:.0e}")

# %% [markdown]
# Now forward and backward on one thread, by turns. The time is the processor's, which other programs do not
# lengthen. The memory is what the process takes at its peak beyond what it had before the step.


# %% tags=["measured"]
def seconds(loss):
    start = process_time()
    loss_and_gradient(loss, query, key, queue)
    return process_time() - start


memory = {}
for name, loss in losses.items():
    peak = PeakMemory(torch.device("cpu"))
    loss_and_gradient(loss, query, key, queue)
    memory[name] = peak.read_mib()
times = [[seconds(loss) for loss in losses.values()] for _ in range(3)]

for name, of_loss in zip(losses, zip(*times, strict=True), strict=True):
    print(f"{name:13}  {1000 * median(of_loss):5.0f} ms  {memory[name]:6.1f} MiB")

# %% [markdown]
# With twice the queue the eager lines take twice the memory, and `co2_loss` takes what it took.
# [README](../../README.md#what-it-gains) has such figures over many sizes, on CPUs and GPUs, and beside
# `torch.compile` and other packages; [MoCo's page](../drop_in/moco.md) has the lines of MoCo's own code that
# change.
