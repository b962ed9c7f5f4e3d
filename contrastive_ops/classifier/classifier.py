"""The classifier with a row for every instance."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import _ops
from .._checks import check_floating, check_integer
from .._contract import PendingStep, SGDSettings
from .._eager import eager
from .._ranks import Disagreement, Ranks, check_group
from .._state import entry, tensor, unwrapped
from .gradients import GradientExchange, Gradients, GradientVersion
from .guard import Guard, Versions, versions
from .history import History
from .indices import STATEFUL, Indices, checked_instances, on_device
from .late import updated_late
from .records import Records, exchange_rows

try:
    from .. import _store
except ImportError as error:  # it was not built: the losses work without it
    _missing: ImportError | None = error
else:
    from .shards import AnyPlan, Shards
    from .storage import MemoryShards, MemoryStore, Storage

    _missing = None

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InstanceClassifier(nn.Module):
    """The weight of a softmax over N instances, of which an active set of A rows is in the denominator.

    The sampling of ConIC: the batch's instances take the place of those that were sampled earliest. Between
    its activations a row costs nothing, and yet moves as dense SGD with momentum and weight decay would have
    moved it: `DelayedSGD` remembers its steps, and a row is caught up when it is activated or read.

    The active set is always full. It starts with instances drawn from the seed, and rows start as random unit
    vectors, each a function of seed and instance.

    Args:
        num_instances: N.
        dim: dimension D of a row.
        active: A, at most N; of more, N are active: the full softmax.
        storage: where the N rows live: "device" (with the weight), "host" (the host's memory, pinned if the
            weight is on a GPU) or "disk" (a RocksDB under `path`, which the extra ``contrastive_ops[disk]``
            brings).
        path: the folder of storage="disk", on a disk with room for 2·D numbers for each row that was ever
            evicted, and as much again for each generation that is kept. One process at a time has it open.
        shards: S, in which the instances are dealt out by the seed. Each has A/S rows, and its own order in
            which they were sampled. What is active, drawn and computed depends on S, and not on how many
            processes there are; with 1 the batch takes the place of the earliest of all, as in the paper.
        group: a `torch.distributed.ProcessGroup`, whose P ranks share the classifier: each holds S/P shards,
            in memory and on disk, and A/P rows of the weight. `activate`, `prefetch`, `read`, `write` and
            `export` are called by all, each with its own instances. `conic_loss(…, group=group)` takes the
            weight and the targets as they are. Keep the classifier out of DistributedDataParallel's module,
            which would give all ranks the rows of one.
        seed: of the first active set and of the rows' initial values, in [0, 2**64).
        dtype: float32 or float64.
        device: of the weight.
        generations: how many checkpoints of storage="disk" can be loaded: those taken last, beside the one
            that was confirmed.

    Attributes:
        weight: (A, D) parameter, the active rows, not normalised; in a group this rank's (A/P, D).
        momentum: (A, D) buffer, theirs.
        carried: None, or while a gradient is accumulated over several batches, a parameter (n, D) for rows
            that were evicted meanwhile. Its ``grad`` is what they have to their credit at the next step, for
            loss scalers and clipping to see; it has no values of interest. A list of parameters that was
            made before does not have it.

    With shards the ``state_dict()`` has, for each of this process's, entries of its own
    (``shards.0003.weight`` …), so that `torch.distributed.checkpoint` saves them from the rank that has them
    and loads them on any number of ranks.

    A checkpoint is the ``state_dict()``: a copy of all rows as they are at that moment, which training leaves
    alone. With storage="disk" it holds the active ones, and taking it makes a generation of the files that
    ``load_state_dict()`` brings them back to, in whatever way the process or the machine stopped. The last
    `generations` of these can be loaded, and the one that `confirm` said is saved. Gradients are in no
    checkpoint: loading one throws those away that there are.

    An exception in any method, an interrupt from the keyboard too, leaves the classifier as if the method had
    not been called, or had run to its end; calls from several threads wait for one another.

    Raises:
        TypeError, ValueError: an argument is wrong, or the folder holds something else.
        ImportError: storage="disk" without rocksdict.
        OSError: the folder is open elsewhere, or the disk failed.

    Example:
        >>> import torch
        >>> from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
        >>> classifier = InstanceClassifier(num_instances=1_000_000, dim=16, active=64)
        >>> optimizer = DelayedSGD(classifier, lr=0.06, momentum=0.9, weight_decay=1e-4)
        >>> views = torch.randn(2, 4, 16)
        >>> target = classifier.activate(torch.tensor([999_999, 3, 3, 500]))
        >>> loss = conic_loss(views, classifier.weight, target, num_instances=classifier.num_instances)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> weight, momentum = classifier.read(torch.tensor([7, 3]))  # rows as dense SGD would have them
        >>> in_shards = InstanceClassifier(num_instances=1_000_000, dim=16, active=64, shards=8)
        >>> in_shards.activate(torch.tensor([999_999])).item() // 8  # 8 rows a shard: of the shard
        0
    """

    weight: nn.Parameter
    momentum: Tensor
    carried: nn.Parameter | None

    def __init__(
        self,
        num_instances: int,
        dim: int,
        active: int = 65536,
        storage: Literal["device", "host", "disk"] = "device",
        path: str | os.PathLike[str] | None = None,
        shards: int = 1,
        group: ProcessGroup | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generations: int = 3,
    ) -> None:
        super().__init__()
        if _missing is not None:
            raise RuntimeError(
                f"InstanceClassifier needs the C++ extension contrastive_ops._store ({_missing}); "
                "install again from source with a C++20 compiler"
            )
        num_instances = check_integer("num_instances", num_instances, 1)
        dim, active = check_integer("dim", dim, 1), check_integer("active", active, 1)
        seed, generations = check_integer("seed", seed, 0), check_integer("generations", generations, 1)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if storage not in ("device", "host", "disk"):
            raise ValueError(f"storage must be 'device', 'host' or 'disk', got {storage!r}")
        if (storage == "disk") != (path is not None):
            raise ValueError(f"path is wanted with storage='disk' alone, got {path!r} with {storage!r}")
        shards = check_integer("shards", shards, 1)
        check_group(group)
        active = min(active, num_instances)
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        self._shards = Shards(num_instances, active, shards, seed, rank, ranks)
        self.num_instances, self.dim, self.seed, self.storage = num_instances, dim, seed, storage
        self.active, self.group = active, group
        self.history = History()
        self._active = self._shards.active_set()
        device = torch.empty(0, device=device).device
        self._storage = self._open_storage(path, dtype, generations)
        self._fresh = True  # until the ranks have compared rows that were made or loaded

        names = self._shards.instances_of(self._active.instances)
        rows = torch.empty(len(names), dim, dtype=dtype, device="cpu")
        _store.initial_rows(seed, names, rows.numpy())
        self.weight = nn.Parameter(rows)
        self.register_buffer("momentum", torch.zeros_like(rows))
        self.register_parameter("carried", None)
        self._gradients = Gradients(self._parameters, [self.weight])
        self._pending: PendingStep | None = None  # that backward is to take, until step() closes it
        self._guard = Guard()
        self._mark()
        self.to(device)

    def _open_storage(
        self, path: str | os.PathLike[str] | None, dtype: torch.dtype, generations: int
    ) -> Storage:
        shards, memory = self._shards, (self.dim, dtype, self.seed)
        if path is None:
            stored = int(shards.starts[-1]) if self.active < self.num_instances else 0
            arguments = (stored, *memory, self.storage == "host")
            if shards.count == 1:
                return MemoryStore(*arguments)
            return MemoryShards(shards.starts, *arguments, shards.instances_of)

        from .disk import DiskShards, DiskStore, folders_of_shards  # it needs fcntl, which Windows lacks

        if shards.count == 1:
            return DiskStore(path, self.num_instances, *memory, generations)
        stores: list[DiskStore] = []
        folders = folders_of_shards(path, shards.count)
        try:
            for shard, start in zip(shards.own, shards.starts, strict=False):
                stores.append(
                    DiskStore(
                        folders[shard],
                        shards.instances[shard],
                        *memory,
                        generations,
                        partial(_instances_from, shards, int(start)),
                        (shard, shards.count),
                        len(shards.own),
                    )
                )
        except BaseException:
            for store in stores:
                store.close()
            raise
        return DiskShards(stores, shards.starts)

    @eager(STATEFUL)
    def activate(self, indices: Tensor) -> Tensor:
        """Make the instances `indices` (B,) active, caught up to now, and return the rows of `weight` that
        they own: (B,) int64 on its device.

        The batch may repeat instances. Call it before the forward that uses its rows, not between a forward
        and its backward.

        Gradients may be accumulated over several batches, each activated before its forward. Rows of these
        batches are not evicted before the optimiser's `step` or `zero_grad`. What gradient a row has that is
        evicted stays to its credit, and `step` spends it. In evaluation, which takes no steps, rows are only
        kept until the next call: with gradients switched off, in eval mode, and for a weight that requires no
        gradient.

        Raises:
            TypeError, ValueError: `indices` is not (B,) int64 in [0, N), or there are more distinct rows
                since the optimiser's last step than fit, in the whole or in a shard. In a group it is an
                error on all ranks, and nothing has changed.
            OSError: the disk failed, or is full. Nothing is lost: the active set is as it was.
        """
        protect = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        with self._exclusively():
            self._gradients.stepping = None
            self._gradients.watch()
            if self.group is None:
                instances = checked_instances("indices", indices, self.num_instances)
                plan = self._active.plan(self._shards.local(instances))
                moving, target = self._prepared(plan), plan.target
            else:
                plan, moving, target = self._plan_across_ranks(indices, protect)
            if moving is not None:
                self._bring_in(moving)
            self._active.commit(plan, protect)
            self._guard.unfinished = None
            return self._to_device(target)

    def _plan_across_ranks(self, indices: Any, protect: bool) -> tuple[AnyPlan, _Moving | None, Indices]:
        """What the instances of all ranks change in this one's shards, once it is certain that all ranks can
        do it, and have read what it takes; and which rows of the whole weight this rank's own have."""
        ranks, every, own, _ = self._gather(indices, "indices", "activate", protect=protect)
        local = self._shards.local(every)
        here = local >= 0
        with ranks.telling():
            plan = self._active.plan(np.ascontiguousarray(local[here]))
            moving = self._prepared(plan)
        ranks.agree({"what it does": "planned"})
        target = np.zeros_like(every)
        target[here] = plan.target + self._shards.first_row
        return plan, moving, ranks.sum(torch.from_numpy(target)).numpy()[own]

    def _ranks(self, method: str, on_hosts: bool = True) -> Ranks:
        assert self.group is not None
        return Ranks(self.group, f"InstanceClassifier.{method}", on_hosts)

    def _gather(self, indices: Any, name: str, method: str, **alike: Any) -> _Gathered:
        """The instances of all ranks, and which of them are this one's."""
        ranks = self._ranks(method)
        with ranks.telling():
            instances = checked_instances(name, indices, self.num_instances)
        # The first row, by its sum: different on all ranks, unless somebody has made them alike.
        row = self.weight.detach()[0].double().sum().item() if self._fresh else 0.0
        said = ranks.agree(
            {**self._identity(), "storage": self.storage, "steps taken": len(self.history), **alike},
            instances=len(instances),
            row=int(np.float64(row).view(np.int64)),
        )
        if self._fresh and ranks.size > 1 and len(set(said["row"])) == 1 and row and np.isfinite(row):
            raise Disagreement(
                "InstanceClassifier: all ranks have the same rows, as DistributedDataParallel makes them: "
                "keep a classifier with a group out of its module, or list its weight in the module's "
                "_ddp_params_and_buffers_to_ignore"
            )
        self._fresh = False
        counts = said["instances"]
        (by_rank,) = ranks.gather([torch.from_numpy(instances)], counts, [0]).wait()
        begin = sum(counts[: ranks.rank])
        every = torch.cat(by_rank).numpy()
        return _Gathered(ranks, every, slice(begin, begin + counts[ranks.rank]), counts)

    @eager(STATEFUL)
    def prefetch(self, next_indices: Tensor) -> None:
        """Start to bring the rows of the next batch near, while the current step computes.

        Changes nothing but how long the next `activate` takes. Call it after this step's `activate`, with
        what the next one is going to be called with.

        Raises:
            TypeError, ValueError: `next_indices` is not (B,) int64 in [0, N).
        """
        with self._exclusively():
            if self.group is None:
                instances = checked_instances("next_indices", next_indices, self.num_instances)
            else:
                instances = self._gather(next_indices, "next_indices", "prefetch").instances
            local = np.unique(self._shards.local(instances))
            local = local[local >= 0]
            self._storage.prefetch(local[self._active.find(local) < 0])

    @eager(STATEFUL)
    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and momentum of any instances (n,), caught up to now, without activating them: two (n, D)
        tensors on the weight's device.

        Raises:
            TypeError, ValueError: `indices` is not (n,) int64 in [0, N).
            OSError: the disk failed.
        """
        with self._exclusively():
            if self.group is not None:
                return self._read_across_ranks(indices)
            return self._read(self._shards.local(checked_instances("indices", indices, self.num_instances)))

    def _read(self, local: Indices) -> tuple[Tensor, Tensor]:
        slots = self._active.find(local)
        at = self._to_device(np.maximum(slots, 0))
        weight, momentum = self.weight.detach()[at], self.momentum[at]
        (late,) = np.nonzero(slots < 0)
        if len(late):
            at = self._to_device(late)
            weight[at], momentum[at] = self._caught_up(local[late])
        return weight, momentum

    def _read_across_ranks(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Each rank sends the rows that others ask for, and gets those that it asks for."""
        ranks, every, own, counts = self._gather(indices, "indices", "read")
        owner, local = self._shards.rank_of(every), self._shards.local(every)
        (here,) = np.nonzero(local >= 0)
        with ranks.telling():
            rows = torch.stack(self._read(local[here]), 1)  # (·, 2, D), in the order of those who ask
        ranks.agree({"what it does": "sending"})
        ends = np.cumsum([0, *counts])
        sent = np.diff(np.searchsorted(here, ends)).tolist()
        mine = owner[own]
        received = np.bincount(mine, minlength=ranks.size).tolist()
        arrived = torch.cat(self._ranks("read", on_hosts=False).send(rows, sent, received).wait())
        order = np.argsort(mine, kind="stable")  # the order in which they have arrived
        found = torch.empty_like(arrived)
        found[self._to_device(order)] = arrived
        return found[:, 0], found[:, 1]

    @eager(STATEFUL)
    def write(self, indices: Tensor, weight: Tensor, momentum: Tensor | None = None) -> None:
        """Overwrite the rows of any instances, as of now: what `read` then says of them.

        A dense classifier's checkpoint goes into one with an active set in this way, some rows at a time.

        Args:
            indices: (n,) int64, distinct.
            weight: (n, D), floating.
            momentum: (n, D), floating; zeros by default.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has been changed.

        Example:
            >>> import torch
            >>> from contrastive_ops import InstanceClassifier
            >>> dense, classifier = torch.randn(1000, 8), InstanceClassifier(1000, 8, active=16)
            >>> for rows in torch.arange(1000).split(256):
            ...     classifier.write(rows, dense[rows])
        """
        telling = contextlib.nullcontext() if self.group is None else self._ranks("write").telling()
        with telling:
            instances, records = self._checked_rows(indices, weight, momentum)
        with self._exclusively():
            local = self._shards.local(instances)
            if self.group is not None:
                local, records = self._write_across_ranks(indices, records)
            self._guard.unfinished = partial(self._overwrite, local, records, len(self.history))
            self._settle()

    def _checked_rows(self, indices: Any, weight: Any, momentum: Any) -> tuple[Indices, Tensor]:
        """The arguments of `write`: instances, and their rows (n, 2, D) as the weight has them."""
        instances = checked_instances("indices", indices, self.num_instances)
        if len(np.unique(instances)) < len(instances):
            raise ValueError("indices must be distinct")
        momentum = torch.zeros_like(weight) if momentum is None and isinstance(weight, Tensor) else momentum
        wanted = (len(instances), self.dim)
        for name, rows in (("weight", weight), ("momentum", momentum)):
            check_floating(name, rows)
            if rows.shape != wanted or rows.is_meta:
                raise ValueError(f"{name} must be {wanted} and have values, got {tuple(rows.shape)}")
        return instances, torch.stack([weight.detach().to(self.weight), momentum.detach().to(self.weight)], 1)

    def _write_across_ranks(self, indices: Tensor, records: Tensor) -> tuple[Indices, Tensor]:
        """The rows of this rank's shards, by local number, that all ranks want to be written."""
        ranks, every, own, counts = self._gather(indices, "indices", "write")
        if len(np.unique(every)) < len(every):
            raise Disagreement("InstanceClassifier.write: indices must be distinct over all ranks")
        owner = self._shards.rank_of(every)
        order = np.argsort(owner[own], kind="stable")
        sent = np.bincount(owner[own], minlength=ranks.size).tolist()
        ends = np.cumsum([0, *counts])
        (here,) = np.nonzero(owner == ranks.rank)
        received = np.diff(np.searchsorted(here, ends)).tolist()
        sending = self._ranks("write", on_hosts=False)
        arrived = sending.send(records[self._to_device(order)], sent, received).wait()
        return self._shards.local(every[here]), torch.cat(arrived)

    def export(self, rows: int = 65536) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All instances in order, `rows` at a time: their numbers (n,), and what `read` says of them."""
        rows = check_integer("rows", rows, 1)
        for first in range(0, self.num_instances, rows):
            instances = torch.arange(first, min(first + rows, self.num_instances), device="cpu")
            yield instances, *self.read(instances)

    @property
    def active_instances(self) -> Tensor:
        """(A,) int64, on the host: the instance that owns each row of `weight`."""
        return torch.from_numpy(self._shards.instances_of(self._active.instances))

    def confirm(self, state: Mapping[str, Any]) -> None:
        """Say that a file with this state, which `state_dict` returned, is safely saved: with storage="disk"
        it can be loaded until another one is confirmed, however many are taken meanwhile.

        Raises:
            ValueError: the state is not of this classifier, or its generation is gone.
        """
        with self._guard.lock:
            if self._in_shards:
                states = [entry(state, f"shards.{shard:04d}.state", "state") for shard in self._shards.own]
                self._storage.confirm([entry(each, "storage", "shard") for each in map(unwrapped, states)])
            else:
                self._storage.confirm(entry(entry(state, "_extra_state", "state"), "storage", "classifier"))

    def verify(self) -> list[str]:
        """Read all that storage="disk" has in its folder, and say what is damaged; [] where all is well."""
        with self._guard.lock:
            return self._storage.verify()

    @staticmethod
    def verify_folder(path: str | os.PathLike[str]) -> list[str]:
        """Like `verify`, for a folder that no classifier has open."""
        from .folder import verify

        return verify(path)

    def close(self) -> None:
        """Close the folder of storage="disk", so that another may open it."""
        self._storage.close()

    def __copy__(self) -> InstanceClassifier:
        """A deep copy: of two that shared rows, either would exchange the other's."""
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copies, pickled ones too, go on as the original would; like other modules' they have no gradients.
        With storage="disk" there are none."""
        if self.group is not None:
            raise TypeError("a classifier with a group cannot be copied or pickled: save its state_dict()")
        with self._exclusively():
            state = {**self.__dict__, "_active": self._active.state()}
            del state["_guard"]
            state["_gradients"] = self._gradients.trained, self._gradients.added
            if self._pending is not None:
                state["_pending"] = replace(self._pending, lock=contextlib.nullcontext())
            state["_parameters"] = {**state["_parameters"], "carried": None}
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard = Guard()
        if self._pending is not None:
            self._pending.lock = self._guard.lock
        self._gradients = Gradients(self._parameters, *state["_gradients"])
        self._gradients.publish(None)
        self._active = self._shards.active_set()
        self._active.load(state["_active"])
        self._mark()

    def _mark(self) -> None:
        """Have the weight refused by optimisers that would leave out the rows that are not active."""
        if self.active < self.num_instances:
            updated_late(self.weight, by="DelayedSGD")

    @property
    def _in_shards(self) -> bool:
        """Whether checkpoints have entries for each shard."""
        return self._shards.count > 1

    def get_extra_state(self) -> dict[str, Any]:
        # What varies in size is in a tuple, which torch.distributed.checkpoint keeps whole.
        state = {**self._identity(), "history": (self.history.state_dict(),)}
        if not self._in_shards:
            state["active"] = _tensors(self._active.state())
            state["storage"] = (self._storage.state_dict(),)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save everything as of one moment: rows are copied, as the rest is."""
        with self._exclusively():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}carried", None)
            if self._in_shards:
                for name in ("weight", "momentum"):
                    del destination[f"{prefix}{name}"]
                self._save_shards(destination, f"{prefix}shards.")
            elif not keep_vars:
                for name in (f"{prefix}weight", f"{prefix}momentum"):
                    destination[name] = destination[name].clone()

    def _save_shards(self, destination: dict[str, Any], prefix: str) -> None:
        active, stored = self._active.state(), self._storage.state_dict()
        for i, shard in enumerate(self._shards.own):
            rows = slice(*self._shards.row_starts[i : i + 2])
            for name, value in zip(("weight", "momentum"), self._rows, strict=True):
                destination[f"{prefix}{shard:04d}.{name}"] = value[rows].clone()
            state = {"active": _tensors(active[i]), "storage": stored[i]}
            destination[f"{prefix}{shard:04d}.state"] = (state,)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        """Load all of a checkpoint, or nothing. Rows are copied into tensors that the optimiser holds, even
        where ``assign=True`` asks for others. Of shards, those of other processes are left alone."""
        names = ["weight", "momentum", "_extra_state"]
        if self._in_shards:
            of_shard = [f"shards.{shard:04d}.{name}" for shard in self._shards.own for name in _OF_SHARD]
            names = [*of_shard, "_extra_state"]
        given = [name for name in names if f"{prefix}{name}" in state_dict]
        if not given:  # missing as a whole, which is for PyTorch to say
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
            return
        missing = [f"{prefix}{name}" for name in names if name not in given]
        if missing:
            raise ValueError(f"the checkpoint must hold the classifier's {missing[0]} with the others")
        if self.weight.is_meta:
            raise ValueError("the classifier is on the meta device: move it by to_empty() before loading")
        with self._guard.lock:
            state = state_dict[f"{prefix}_extra_state"]
            if self._in_shards:
                rows = self._rows_of_shards(state_dict, f"{prefix}shards.")
                shards = [state_dict[f"{prefix}shards.{shard:04d}.state"] for shard in self._shards.own]
                if isinstance(state, Mapping):
                    state = {**state, "shards_here": [unwrapped(each) for each in shards]}
                self._checked(state)
                others = {key: x for key, x in state_dict.items() if not key.startswith(f"{prefix}shards.")}
                state_dict = others | {f"{prefix}{name}": x for name, x in rows.items()}
                state_dict[f"{prefix}_extra_state"] = state
            else:
                self._checked(state)
                for name in ("weight", "momentum"):
                    shape = tuple(self.weight.shape)
                    tensor(
                        state_dict, f"{prefix}{name}", "classifier", self.weight.dtype, shape, finite=False
                    )
            self._guard.torn = "loading a checkpoint was interrupted"
            self._gradients.publish(None)
            metadata = {**local_metadata, "assign_to_params_buffers": False}
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def _rows_of_shards(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """Weight and momentum of this process's shards, one after the other."""
        rows: dict[str, list[Tensor]] = {"weight": [], "momentum": []}
        for shard in self._shards.own:
            shape = (self._shards.rows[shard], self.dim)
            for name, parts in rows.items():
                key = f"{prefix}{shard:04d}.{name}"
                part = tensor(state_dict, key, "classifier", self.weight.dtype, shape, finite=False)
                parts.append(part.to(self.weight.device))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        with self._guard.lock:
            active, history, storage = self._checked(state)
            self._guard.torn = "loading a checkpoint was interrupted"
            self._gradients.publish(None)
            self.weight.grad = None
            self._withdraw()
            self._guard.unfinished = self._gradients.stepping = None
            self._storage.load_state_dict(storage)
            self._active, self.history = active, history
            self._guard.torn = ""
            self._fresh = True

    def _checked(self, state: Mapping[str, Any]) -> tuple[Any, History, Any]:
        """The active set, the history and the storage's state of a state that can be loaded.

        Raises:
            ValueError: it cannot.
        """
        part = "classifier"
        for name, here in self._identity().items():
            if entry(state, name, part) != here:
                raise ValueError(f"the checkpoint's {name} is {state[name]}, the classifier's {here}")
        history = History.from_state(entry(state, "history", part))
        shards = entry(state, "shards_here", part) if self._in_shards else [state]
        loaded = []
        for each, shard in zip(shards, self._shards.own, strict=True):
            parts, count = entry(each, "active", part), self._shards.rows[shard]
            sizes = {"instances": count, "order": count, "protected": 1}
            tensors = {
                name: tensor(parts, name, "active set", torch.int64, (size,)) for name, size in sizes.items()
            }
            loaded.append({name: value.cpu().contiguous().numpy() for name, value in tensors.items()})
        active = self._shards.active_set()
        active.load(loaded if self._shards.count > 1 else loaded[0])
        storage = [entry(each, "storage", part) for each in shards]
        of_all = storage if self._shards.count > 1 else storage[0]
        self._storage.check(of_all, len(history))
        return active, history, of_all

    def _identity(self) -> dict[str, Any]:
        identity = {
            "num_instances": self.num_instances,
            "dim": self.dim,
            "active_rows": self.active,
            "seed": self.seed,
            "dtype": str(self.weight.dtype),
        }
        return identity | ({"shards": self._shards.count} if self._in_shards else {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InstanceClassifier:
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if probe.dtype != self.weight.dtype:
            raise TypeError(
                f"rows stay in {self.weight.dtype}, in which they are updated, and cannot become "
                f"{probe.dtype}; conic_loss multiplies them in the views' dtype"
            )
        weight = self.weight
        self._storage.move(probe.device, fn)  # first, as it may be refused
        super()._apply(fn, recurse)
        if self.weight is not weight:  # as PyTorch may be set to have it
            self._gradients.replace(self.weight)
        self._mark()
        return self

    def _exclusively(self) -> AbstractContextManager[None]:
        """Alone, from a settled state to a settled state.

        Tensors are written to detached from autograd, rather than with gradients switched off, which an
        interrupt at the wrong moment would leave off.
        """
        return self._guard.exclusively(self._settle)

    def _settle(self) -> None:
        """Complete or undo what an exception has cut off, and record a step that backward has taken.

        May be cut off itself, at any place, and be called again.
        """
        self._guard.finish()
        step = self._pending
        if step is not None and (
            step.taken or (step.begun and self._guard.was_written(*self._rows, step.begun, launched=True))
        ):
            step.taken = True
            if step.recorded is None:
                step.recorded = len(self.history)
            self._record(step.recorded, step.settings)
        if self._gradients.was_dropped:
            self._release()
        self._gradients.settle()

    def _release(self) -> None:
        """Rows may be evicted: no gradient waits for them to come back to."""
        self._active.release()
        self._gradients.added = False

    def _withdraw(self) -> None:
        """No backward takes the step any more that it was told to."""
        if self._pending is not None:
            self._pending.withdrawn = True
            self._pending = None

    @property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Weight and momentum of the active instances, as operators write them."""
        return self.weight.detach(), self.momentum

    def _prepared(self, plan: AnyPlan) -> _Moving | None:
        """What a plan moves, read from the storage, whose errors come before anything is changed; None where
        no row changes hands."""
        if not len(plan.slots):
            return None
        incoming, steps = self._storage.fetch(plan.incoming)
        coefficients = self.history.coefficients(steps)
        outgoing = self._storage.reserve(plan.evicted)
        exchange = _Exchange(plan, outgoing, versions(*self._rows), self._gradients.plan(plan))
        return _Moving(exchange, incoming, coefficients)

    def _bring_in(self, moving: _Moving) -> None:
        """Exchange rows, and their gradients; the guard undoes it until the plan is committed."""
        exchange, incoming, coefficients = moving
        plan, outgoing = exchange.plan, exchange.outgoing
        self._guard.unfinished = partial(self._undo, exchange)
        self._guard.launch(exchange_rows, self._rows, plan.slots, incoming, coefficients, outgoing)
        if exchange.gradient is not None:
            self._gradients.exchange(exchange.gradient)
        self._storage.commit(plan.evicted, len(self.history))

    def _undo(self, exchange: _Exchange) -> None:
        """Bring the rows back that an interrupted exchange has moved, from the storage's records of them."""
        plan, count = exchange.plan, len(exchange.plan.slots)
        if not self._active.awaits(plan) or not self._guard.was_written(*self._rows, exchange.versions):
            return  # it was committed, or nothing was written
        unchanged = np.tile(np.eye(2), (count, 1, 1))
        scratch = Records(self.weight.new_empty(count, 2, self.dim), np.arange(count))
        self._guard.launch(exchange_rows, self._rows, plan.slots, exchange.outgoing, unchanged, scratch)
        if self.weight.is_cuda and not exchange.outgoing.values.is_cuda:
            # Pinned memory that is freed goes to others at once, and the GPU may not have read it yet.
            torch.cuda.current_stream(self.weight.device).synchronize()
        if exchange.gradient is not None:
            self._gradients.undo(exchange.gradient)

    def _take_step(self, settings: SGDSettings) -> None:
        """Take a step with the gradients of active rows, and those of evicted ones."""
        whole, carried = self._gradients.whole, self._gradients.carried
        assert whole is not None
        evicted = None
        if carried is not None:
            weight, momentum = self._caught_up(carried.instances)
            _ops.sgd_(weight, momentum, carried.gradient, *settings, None)
            evicted = carried.instances, torch.stack([weight, momentum], 1)
        step = _Step(settings, len(self.history), versions(*self._rows), GradientVersion.of(whole), evicted)
        self._guard.unfinished = partial(self._finish_interrupted, step)
        self._gradients.stepping = step.gradient
        self._guard.launch(_ops.sgd_, *self._rows, whole.detach(), *settings, None)
        self._finish(step)
        self._guard.unfinished = None

    def _finish(self, step: _Step) -> None:
        """Do what is left when the active rows have taken a step."""
        if step.evicted is not None:
            self._overwrite_stored(*step.evicted, step.length + 1)
        self._gradients.spend(step.gradient)
        self._record(step.length, step.settings)

    def _finish_interrupted(self, step: _Step) -> None:
        """Do the rest of a step if its operator has run; otherwise it was not taken."""
        if self._guard.was_written(*self._rows, step.versions):
            self._finish(step)
        else:
            self._gradients.stepping = None

    def _record(self, length: int, settings: SGDSettings) -> None:
        """Note once that the active rows have taken the step after the first `length`; others will."""
        if len(self.history) == length:
            self._release()
            self.history.append(settings)

    def _caught_up(self, instances: Indices) -> tuple[Tensor, Tensor]:
        """Weight and momentum (n, D) of instances that are not active."""
        values, steps = self._storage.peek(instances)
        every = np.arange(len(instances))
        incoming = Records(values.to(self.weight.device), every)
        scratch = Records(torch.empty_like(incoming.values), every)
        rows = incoming.values[:, 0].clone(), incoming.values[:, 1].clone()
        exchange_rows(rows, every, incoming, self.history.coefficients(steps), scratch)
        return rows

    def _overwrite(self, instances: Indices, records: Tensor, step: int) -> None:
        """Overwrite the rows of any instances by records (n, 2, D), as of `step`."""
        slots = self._active.find(instances)
        late, active = slots < 0, slots >= 0
        if late.any():
            self._overwrite_stored(instances[late], records[self._to_device(late)], step)
        at = self._to_device(slots[active])
        self.weight.detach()[at], self.momentum[at] = records[self._to_device(active)].unbind(1)

    def _overwrite_stored(self, instances: Indices, records: Tensor, step: int) -> None:
        """Overwrite the stored records of instances that are not active."""
        outgoing = self._storage.reserve(instances)
        at = torch.from_numpy(outgoing.at).to(outgoing.values.device)
        outgoing.values[at] = records.to(outgoing.values.device)
        self._storage.commit(instances, step)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return on_device(array, self.weight.device)

    def extra_repr(self) -> str:
        shards = f", shards={self._shards.count}" if self._in_shards else ""
        share = "" if self.group is None else f", rows of this rank={len(self.weight)}"
        return (
            f"num_instances={self.num_instances}, dim={self.dim}, active={self.active}{shards}, "
            f"storage={self.storage!r}{share}"
        )


_OF_SHARD = ("weight", "momentum", "state")  # its entries in a checkpoint


def _instances_from(shards: Shards, start: int, positions: Indices) -> Indices:
    """The instances at these positions of the shard whose first local number this is."""
    return shards.instances_of(positions + start)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


class _Gathered(NamedTuple):
    """The instances of all ranks.

    Attributes:
        ranks: which exchange what is on the hosts.
        instances: those of all, in the order of the ranks.
        own: which of them are this rank's.
        counts: how many each rank has.
    """

    ranks: Ranks
    instances: Indices
    own: slice
    counts: list[int]


@dataclass(frozen=True)
class _Exchange:
    """An exchange of rows that may have to be undone.

    Attributes:
        plan: which rows.
        outgoing: the storage's records of the evicted rows.
        versions: of momentum and weight before.
        gradient: what happens to the rows' gradient, if there is one.
    """

    plan: AnyPlan
    outgoing: Records
    versions: Versions
    gradient: GradientExchange | None


class _Moving(NamedTuple):
    """An exchange of rows that can begin.

    Attributes:
        exchange: what undoes it.
        incoming: the records of the rows that come.
        coefficients: (n, 2, 2) what catches them up.
    """

    exchange: _Exchange
    incoming: Records
    coefficients: np.ndarray


@dataclass(frozen=True)
class _Step:
    """A step on a gradient that may have to be completed.

    Attributes:
        settings: as it is taken.
        length: of the history before.
        versions: of momentum and weight before.
        gradient: the weight's.
        evicted: instances (n,) with a gradient that are not active, and their rows (n, 2, D) after the step.
    """

    settings: SGDSettings
    length: int
    versions: Versions
    gradient: GradientVersion
    evicted: tuple[Indices, Tensor] | None
