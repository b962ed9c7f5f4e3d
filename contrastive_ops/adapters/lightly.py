"""lightly's `NTXentLoss` and `CO2Regularizer`, with their arguments and their memory bank.

from contrastive_ops.adapters.lightly import CO2Regularizer, NTXentLoss
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import check_temperature, consistency_loss, nt_xent_loss
from ._common import info_nce, unit, world


class MemoryBank(nn.Module):
    """The memory bank of lightly's losses, which is read where it lies.

    It starts with random unit rows, the same as lightly's from the same seed, and stores the same rows in the
    same places. Where a batch does not fit before the bank's end, what fits is stored, the rest is dropped,
    and the next batch starts at row 0 (a `KeyQueue` would go on at the front). As in lightly, buffers are not
    persistent: they are in no state_dict, and a training that is resumed starts with random rows.

    Unlike lightly's it moves to the device of what it is given first, and an update does not wait for the
    device.

    Args:
        size: number of rows, or (number of rows, dimension); 0 rows: no bank. Without a dimension it is that
            of the first batch.
        gather_distributed: store the rows of all ranks, in their order, in the bank of each.

    Attributes:
        bank: (size, D) buffer; (size,) as long as the dimension is not known.
        bank_ptr: (1,) int64 buffer, the row that the next batch starts at.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(each < 0 for each in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if isinstance(size, int) and size > 0:
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is recommended to "
                "set the feature dimension with 'size=(n, dim)' when creating the memory bank. Distributed "
                "training might fail if the feature dimension is not set.",
                UserWarning,
                stacklevel=3,
            )
        self.gather_distributed = gather_distributed
        self.register_buffer("bank", torch.empty(self.size), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)
        if len(self.size) > 1:
            self._fill(self.size)

    def _fill(self, size: tuple[int, ...]) -> None:
        self.bank = nn.functional.normalize(torch.randn(size).type_as(self.bank), dim=-1)

    def negatives(self, output: Tensor) -> Tensor | None:
        """(size, D), the bank as it is, ready for rows such as these; None where there is none."""
        if self.size[0] == 0:
            return None
        if self.bank.ndim == 1:
            self._fill((*self.size, *output.shape[1:]))
        if self.bank.device != output.device:
            self.to(output.device)
        return self.bank

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Overwrite the oldest rows of the bank by these, as far as they fit before its end."""
        if self.gather_distributed and (group := world()):
            parts = [torch.empty_like(rows) for _ in range(group.size())]
            dist.all_gather(parts, rows.contiguous(), group=group)
            rows = torch.cat(parts)
        size = self.size[0]
        rows = rows[:size]
        places = self.bank_ptr + torch.arange(len(rows), device=rows.device)
        # Those that do not fit write what is there already, at the front: so nothing depends on the pointer's
        # value on the host.
        fits, places = places < size, places % size
        kept = torch.where(fits.unsqueeze(1), rows.to(self.bank.dtype), self.bank[places])
        self.bank.index_copy_(0, places, kept)
        self.bank_ptr.add_(len(rows))
        self.bank_ptr.masked_fill_(self.bank_ptr >= size, 0)


class NTXentLoss(nn.Module):
    """lightly's `NTXentLoss`: NT-Xent over a batch, or InfoNCE over a memory bank.

    Values and gradients are lightly's. Without a bank this is `nt_xent_loss`. With one it is `info_nce_loss`
    of the queries `out0` and the keys `out1` over the bank as it was before the call; then `out1`,
    normalised, goes into the bank if `out0` requires a gradient. A gradient reaches `out1` too where it
    requires one, by its part as the positive.

    What differs: the bank is neither copied in each step nor left on another device than the batch, and a
    negative temperature is refused.

    Args:
        temperature: τ, from 1e-6 to 1e6.
        memory_bank_size: (K, D), the bank's; 0 for none. K alone takes D from the first batch, with a
            warning.
        gather_distributed: over the ranks of `torch.distributed`, if there are several: without a bank, the
            views of all ranks are each other's negatives (`nt_xent_loss(group=…)`); with one, each rank's
            bank takes the keys of all.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Shapes:
        out0, out1: (B, D), float16, bfloat16, float32 or float64; returns a scalar.

    Example:
        >>> import torch
        >>> from contrastive_ops.adapters.lightly import NTXentLoss
        >>> criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))
        >>> query, key = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
        >>> criterion(query, key).backward()
        >>> criterion.memory_bank.bank_ptr.item()
        8
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed must be False: this PyTorch has no torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views, or of queries and their keys."""
        bank = self.memory_bank.negatives(out1)
        if bank is None:
            group = world() if self.gather_distributed else None
            return nt_xent_loss(out0, out1, temperature=self.temperature, group=group)
        loss = info_nce(out0, out1, bank, temperature=self.temperature, normalize=True)
        if out0.requires_grad:
            self.memory_bank.update(unit(out1.detach()))
        return loss


class CO2Regularizer(nn.Module):
    """lightly's `CO2Regularizer`, with the gradient that lightly's lacks.

    The value is lightly's: α ½ (KL(P‖Q) + KL(Q‖P)), where Q is the softmax of a query's similarities to its
    key and to the negatives, and P that of its key to the query and to the negatives. Negatives are the rows
    of the memory bank as they were before the call, or else the other rows of the batch: keys for a query,
    queries for a key. `out1`, normalised, goes into the bank in every call.

    lightly's class ends in ``torch.tensor(self.alpha * 0.5 * div)``, a new tensor that knows nothing of what
    it was computed from: it requires no gradient, so it changes the loss that is printed and no weight. Here
    the gradient is the one of the paper: to `out0`, through Q and its similarities as a query. P is a
    pseudo-label and negatives are constants, so none reaches `out1`, whether it requires one or not.

    Args:
        alpha: α, the weight of the term.
        t_consistency: the temperature of both softmaxes, from 1e-6 to 1e6.
        memory_bank_size: as of `NTXentLoss`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Shapes:
        out0, out1: (B, D), float16, bfloat16, float32 or float64; returns a scalar.

    Example:
        >>> import torch
        >>> from contrastive_ops.adapters.lightly import CO2Regularizer
        >>> co2 = CO2Regularizer(alpha=0.3, memory_bank_size=(4096, 128))
        >>> query, key = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
        >>> co2(query, key).backward()
    """

    def __init__(
        self, alpha: float = 1, t_consistency: float = 0.05, memory_bank_size: int | Sequence[int] = 0
    ) -> None:
        super().__init__()
        check_temperature("t_consistency", t_consistency)
        self.alpha = alpha
        self.t_consistency = t_consistency
        self.memory_bank = MemoryBank(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The term, times α, of queries and their keys."""
        key = out1.detach()
        bank = self.memory_bank.negatives(key)
        if bank is None:
            return self.alpha * self._within_batch(out0, key)
        loss = consistency_loss(out0, key, bank, temperature=self.t_consistency, include_positive=True)
        self.memory_bank.update(unit(key))
        return self.alpha * loss

    def _within_batch(self, query: Tensor, key: Tensor) -> Tensor:
        """The negatives of a query are keys, those of a key are queries. Side by side they make one row: in
        (key_j, query_j), the row (query_i, 0) meets key_j, and (0, key_i) meets query_j. The row j = i is the
        positive of both."""
        query, key = unit(query), unit(key)
        nothing = torch.zeros_like(query)
        rows = torch.cat([key, query.detach()], dim=1)
        return consistency_loss(
            torch.cat([query, nothing], dim=1),
            torch.cat([nothing, key], dim=1),
            rows,
            temperature=self.t_consistency,
            normalize=False,
        )
