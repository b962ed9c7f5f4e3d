"""Classifiers with a row for every instance, and the optimiser that updates untouched rows late."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from . import _ops
from ._history import History, check_step
from .functional import (
    SGDStep,
    check_flag,
    check_floating,
    check_floating_dtype,
    check_integer,
    check_number,
)

try:
    from . import _rows
    from ._disk import DiskRows, verify
    from ._storage import MemoryRows, Storage
except ImportError as error:  # the extension was not built: the losses work without it
    _missing: ImportError | None = error
else:
    _missing = None


def checked_instances(name: str, indices: Any, num_instances: int) -> NDArray[np.int64]:
    """The numbers of instances that a tensor (B,) holds, on the host.

    Raises:
        TypeError, ValueError: it is not (B,) int64 in [0, N), or has no values.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name} must be of dtype int64, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"{name} must be (B,), got shape {tuple(indices.shape)}")
    if indices.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")
    array = indices.detach().cpu().contiguous().numpy()
    for wrong in np.nonzero((array < 0) | (array >= num_instances))[0]:
        raise ValueError(f"{name} must be in [0, {num_instances}), got {array[wrong]} at position {wrong}")
    return array


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
        seed: of the first active set and of the rows' initial values, in [0, 2**64).
        dtype: float32 or float64.
        device: of the weight.
        generations: how many checkpoints of storage="disk" can be loaded: those taken last, beside the one that
            was confirmed.

    Attributes:
        weight: (A, D) parameter, the active rows, not normalised.
        momentum: (A, D) buffer, theirs.

    A checkpoint is the ``state_dict()``, which holds all rows; with storage="disk" it holds the active ones,
    and taking it makes a generation of the files that ``load_state_dict()`` brings them back to, in whatever way
    the process or the machine stopped. The last `generations` of these can be loaded, and the one that `confirm`
    said is saved.

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
    """

    weight: nn.Parameter
    momentum: Tensor

    def __init__(
        self,
        num_instances: int,
        dim: int,
        active: int = 65536,
        storage: Literal["device", "host", "disk"] = "device",
        path: str | os.PathLike[str] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generations: int = 3,
    ) -> None:
        super().__init__()
        if _missing is not None:
            raise RuntimeError(
                f"InstanceClassifier needs the C++ extension contrastive_ops._rows ({_missing}); "
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
        active = min(active, num_instances)
        self.num_instances, self.dim, self.seed, self.storage = num_instances, dim, seed, storage
        self.history = History()
        self._active = _rows.ActiveSet(num_instances, active, seed)
        device = torch.empty(0, device=device).device
        self._storage: Storage
        if path is not None:
            self._storage = DiskRows(path, num_instances, dim, dtype, seed, generations)
        else:
            stored = num_instances if active < num_instances else 0
            self._storage = MemoryRows(stored, dim, dtype, seed, on_host=storage == "host")

        rows = torch.empty(active, dim, dtype=dtype, device="cpu")
        _rows.initial_rows(seed, self._active.instances, rows.numpy())
        self.weight = nn.Parameter(rows)
        self.register_buffer("momentum", torch.zeros_like(rows))
        self._guard()
        self.to(device)

    @torch.no_grad()
    def activate(self, indices: Tensor) -> Tensor:
        """Make the instances `indices` (B,) active, caught up to now, and return the rows of `weight` that
        they own: (B,) int64 on its device.

        The batch may repeat instances. Rows that were activated since the optimiser's last step are never
        evicted, so that gradients may be accumulated over several batches. Call it before the forward that
        uses its rows, not between a forward and its backward.

        Raises:
            TypeError, ValueError: `indices` is not (B,) int64 in [0, N), or there are more distinct rows
                since the optimiser's last step than fit.
            OSError: the disk failed, or is full. Nothing is lost: the active set is as it was.
        """
        plan = self._active.plan(checked_instances("indices", indices, self.num_instances))
        if len(plan.slots):
            rows = self.weight, self.momentum
            incoming, coming, steps = self._storage.fetch(plan.incoming)
            room, going = self._storage.room(plan.evicted)
            self._exchange(*rows, plan.slots, incoming, coming, self.history.coefficients(steps), room, going)
            try:
                self._storage.keep(plan.evicted, len(self.history))
            except OSError:  # back into their slots, as they were
                unchanged = np.tile(np.eye(2), (len(plan.slots), 1, 1))
                self._exchange(*rows, plan.slots, room.clone(), going, unchanged, room, going)
                raise
        self._active.commit(plan)
        return self._to_device(plan.target)

    def prefetch(self, next_indices: Tensor) -> None:
        """Start to bring the rows of the next batch near, while the current step computes.

        Changes nothing but how long the next `activate` takes. Call it after this step's `activate`, with
        what the next one is going to be called with.
        """
        indices = np.unique(checked_instances("next_indices", next_indices, self.num_instances))
        self._storage.prefetch(indices[self._active.find(indices) < 0])

    @torch.no_grad()
    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and momentum of any instances (n,), caught up to now, without activating them: two (n, D)
        tensors on the weight's device."""
        instances = checked_instances("indices", indices, self.num_instances)
        slots = self._active.find(instances)
        at = self._to_device(np.maximum(slots, 0))
        weight, momentum = self.weight.detach()[at], self.momentum[at]
        (late,) = np.nonzero(slots < 0)
        if len(late):
            records, steps = self._storage.peek(instances[late])
            records = records.to(weight.device)
            every = np.arange(len(late))
            coefficients, room = self.history.coefficients(steps), torch.empty_like(records)
            self._exchange(weight, momentum, late, records, every, coefficients, room, every)
        return weight, momentum

    def export(self, rows: int = 65536) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All instances in order, `rows` at a time: their numbers (n,), and what `read` says of them."""
        rows = check_integer("rows", rows, 1)
        for first in range(0, self.num_instances, rows):
            instances = torch.arange(first, min(first + rows, self.num_instances), device="cpu")
            yield instances, *self.read(instances)

    @property
    def active_instances(self) -> Tensor:
        """(A,) int64, on the host: the instance that owns each row of `weight`."""
        return torch.from_numpy(self._active.instances)

    def confirm(self, state: Mapping[str, Any]) -> None:
        """Say that a file with this state, which `state_dict` returned, is safely saved: with storage="disk" it
        can be loaded until another one is confirmed, however many are taken meanwhile.

        Raises:
            ValueError: the state is not of this classifier, or its generation is gone.
        """
        extra = state.get("_extra_state") if isinstance(state, Mapping) else None
        if not isinstance(extra, Mapping) or "storage" not in extra:
            raise ValueError("state must be what this classifier's state_dict() returned")
        self._storage.confirm(extra["storage"])

    def verify(self) -> list[str]:
        """Read all that storage="disk" has in its folder, and say what is damaged: nothing, where all is well."""
        return self._storage.verify()

    @staticmethod
    def verify_folder(path: str | os.PathLike[str]) -> list[str]:
        """The same of a folder that no classifier has open."""
        return verify(path)

    def close(self) -> None:
        """Close the folder of storage="disk", so that another may open it."""
        self._storage.close()

    def __getstate__(self) -> dict[str, Any]:
        """Copies, pickled ones too, go on as the original would. With storage="disk" there are none."""
        return {**self.__dict__, "_active": self._active.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._active = _rows.ActiveSet(self.num_instances, len(self.weight), self.seed)
        self._active.load(state["_active"])
        self._guard()

    def _guard(self) -> None:
        """Have optimisers that cannot be late refuse the weight."""
        _classifiers.add(self)
        _watch_optimizers()

    def get_extra_state(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "active": {name: torch.from_numpy(value) for name, value in self._active.state().items()},
            "history": self.history.state_dict(),
            "storage": self._storage.state_dict(),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._storage.load_state_dict(state["storage"])
        self._active.load({name: value.cpu().numpy() for name, value in state["active"].items()})
        self.history.load_state_dict(state["history"])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:  # before anything is overwritten
            for name, here in self._identity().items():
                if state[name] != here:
                    raise ValueError(f"the checkpoint's {name} is {state[name]}, the classifier's {here}")
            self._storage.check(state["storage"])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _identity(self) -> dict[str, Any]:
        rows, dim = self.weight.shape
        return {
            "num_instances": self.num_instances,
            "dim": dim,
            "active_rows": rows,
            "seed": self.seed,
            "dtype": str(self.weight.dtype),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InstanceClassifier:
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if probe.dtype != self.weight.dtype:
            raise TypeError(
                f"rows stay in {self.weight.dtype}, in which they are updated, and cannot become "
                f"{probe.dtype}; conic_loss multiplies them in the views' dtype"
            )
        super()._apply(fn, recurse)
        self._storage.move(probe.device, fn)
        return self

    def _exchange(
        self,
        weight: Tensor,
        momentum: Tensor,
        slots: NDArray[np.int64],
        incoming: Tensor,
        incoming_rows: NDArray[np.int64],
        coefficients: NDArray[np.float64],
        outgoing: Tensor,
        outgoing_rows: NDArray[np.int64],
    ) -> None:
        """The operator, with arrays of the host."""
        at, source, matrices, target = map(
            self._to_device, (slots, incoming_rows, coefficients, outgoing_rows)
        )
        _ops.exchange_rows_(weight, momentum, at, incoming, source, matrices, outgoing, target, None)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.weight.device, non_blocking=True)

    def _take_step(self, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        """The active rows have taken a step; the others will."""
        self.history.append(lr, momentum, weight_decay, nesterov)
        self._active.release()

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"num_instances={self.num_instances}, dim={dim}, active={rows}, storage={self.storage!r}"


class DelayedSGD(Optimizer):
    """SGD with momentum and weight decay over all rows of an `InstanceClassifier`, at the cost of the active.

    In the convention of torch.optim.SGD, with g = grad + λ w:

        v ← m v + g        w ← w − η v,  or with `nesterov`  w ← w − η (g + m v)

    Rows that are not active have no gradient, and their steps are taken late and exactly, all at once, when
    they are activated or read. Learning rate, momentum, weight decay and nesterov may change with every step:
    schedulers work. A step that a loss scaler skips is none. Without momentum v is g, as the formula says;
    torch.optim.SGD then leaves its buffer alone, which tells only if momentum comes back later.

    Only an optimiser that moves each row linearly, whatever the others do, can be delayed. That rules out
    LARS, LAMB, Adam and clipping the weight's norm; clipping gradients is fine.

    Args:
        classifier: whose `weight` is optimised. The momentum is the classifier's too, and in its checkpoints.
        lr: η ≥ 0. The defaults are the ConIC paper's.
        momentum: m in [0, 1).
        weight_decay: λ ≥ 0.
        nesterov: as in torch.optim.SGD.

    Raises:
        TypeError, ValueError: an argument is wrong; also in `step`, of a group's values as they are then.

    Example:
        >>> import torch
        >>> from contrastive_ops import DelayedSGD, InstanceClassifier
        >>> optimizer = DelayedSGD(InstanceClassifier(1000, 8, active=16), lr=0.06)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    """

    def __init__(
        self,
        classifier: InstanceClassifier,
        lr: float = 0.06,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
    ) -> None:
        if not isinstance(classifier, InstanceClassifier):
            raise TypeError(f"classifier must be an InstanceClassifier, got {type(classifier).__name__}")
        self.classifier = classifier
        self._in_backward: SGDStep | None = None
        self._stepped = False  # whether the gradient there is was spent on a step
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        _check_settings(**defaults)
        super().__init__([classifier.weight], defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = ("classifier", "_in_backward", "_stepped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("DelayedSGD holds one weight; other parameters want an optimizer of their own")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradient there is; without one, none, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weight, pending = self.classifier.weight, self._in_backward
        if pending is not None and pending.taken:
            if weight.grad is not None:
                raise RuntimeError("weight has a gradient beside the step that backward has taken")
            self._in_backward = None
            self.classifier._take_step(pending.lr, pending.momentum, pending.weight_decay, pending.nesterov)
        elif weight.grad is not None:
            settings = self._settings()
            _ops.sgd_(weight, self.classifier.momentum, weight.grad, *settings, None)
            self.classifier._take_step(*settings)
            self._stepped = True
        return loss

    def in_backward(self) -> SGDStep:
        """The step to come, for ``conic_loss(…, update=optimizer.in_backward())`` to take in its backward,
        where the weight's gradient is never stored. `step` then only closes it. One backward a step; not
        with a loss scaler, nor with clipping.

        Example:
            >>> import torch
            >>> from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
            >>> classifier = InstanceClassifier(1000, 8, active=16)
            >>> optimizer = DelayedSGD(classifier)
            >>> target = classifier.activate(torch.tensor([3, 999]))
            >>> views = torch.randn(2, 2, 8, requires_grad=True)
            >>> loss = conic_loss(views, classifier.weight, target, update=optimizer.in_backward())
            >>> loss.backward(); optimizer.step()
        """
        if self._in_backward is not None and self._in_backward.taken:
            raise RuntimeError("backward has taken a step already: call step() before the next in_backward()")
        self._in_backward = SGDStep(self.classifier.momentum, *self._settings())
        return self._in_backward

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim. Rows whose gradient is thrown away here, unspent, may be evicted again: a loss
        scaler that skips many steps does not fill the active set."""
        if self.classifier.weight.grad is not None and not self._stepped:
            self.classifier._active.release()
        self._stepped = False
        super().zero_grad(set_to_none)

    def _settings(self) -> tuple[float, float, float, bool]:
        (group,) = self.param_groups
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        return _check_settings(**settings)


class MemoryBank(nn.Module):
    """The classifier of InstDisc (Wu et al., CVPR 2018): each row the exponential average of past features.

        w_n ← normalise(μ w_n + (1 − μ) x̂)

    Rows get no gradient. Use it as `conic_loss`'s weight, with the instances' numbers as the target.

    Args:
        num_instances: N.
        dim: dimension D.
        momentum: μ in [0, 1].
        seed: of the rows, random unit vectors at first.
        dtype: of the rows, floating.
        device: of the rows.

    Attributes:
        rows: (N, D) buffer of unit vectors.

    Example:
        >>> import torch
        >>> from contrastive_ops import MemoryBank, conic_loss
        >>> bank, indices = MemoryBank(num_instances=1000, dim=16), torch.tensor([7, 999])
        >>> features = torch.randn(2, 16, requires_grad=True)
        >>> loss = conic_loss(features[None], bank.rows, indices, temperature=0.07)
        >>> loss.backward()
        >>> bank.update(indices, features)
    """

    rows: Tensor

    def __init__(
        self,
        num_instances: int,
        dim: int,
        momentum: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_instances, dim = check_integer("num_instances", num_instances, 1), check_integer("dim", dim, 1)
        seed = check_integer("seed", seed, 0)
        check_floating_dtype(dtype)
        self.momentum = check_number("momentum", momentum, minimum=0)
        if momentum > 1:
            raise ValueError(f"momentum must be at most 1, got {momentum}")
        # The same rows on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = F.normalize(torch.randn(num_instances, dim, generator=generator, device="cpu"), dim=1)
        self.register_buffer("rows", rows.to(torch.empty(0, device=device).device, dtype))

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """Average the features of instances into their rows; call it after backward.

        Computed in the wider of both dtypes, in float32 at least. A feature that is not finite makes its own
        instance's row NaN, and no other.

        Args:
            indices: (B,) int64. The features of an instance that repeats are averaged first. A batch of none
                changes nothing.
            features: (B, D), or (V, B, D) of V views, floating, on the rows' device; normalised here.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has been changed.
        """
        numbers = checked_instances("indices", indices, len(self.rows))
        check_floating("features", features)
        wanted = (len(numbers), self.rows.shape[1])
        if (
            features.shape[-2:] != wanted
            or features.ndim not in (2, 3)
            or (features.ndim == 3 and not len(features))
        ):
            raise ValueError(
                f"features must be {wanted} or (V, {wanted[0]}, {wanted[1]}), got {tuple(features.shape)}"
            )
        if features.device != self.rows.device:
            raise ValueError(
                f"features must be on the device of the rows, {self.rows.device}, got {features.device}"
            )
        if not len(numbers):
            return
        dtype = torch.promote_types(torch.promote_types(features.dtype, self.rows.dtype), torch.float32)
        unit = F.normalize(features.to(dtype), dim=-1)
        if unit.ndim == 3:
            unit = unit.mean(0)
        # Sorted, so that an instance's features are added in a fixed order: equal input gives equal bits.
        arrays = (np.argsort(numbers, kind="stable"), *np.unique(numbers, return_counts=True))
        order, instances, lengths = (torch.from_numpy(array).to(unit.device) for array in arrays)
        mean = torch.segment_reduce(unit[order], "mean", lengths=lengths, unsafe=True)
        rows = self.momentum * self.rows[instances].to(dtype) + (1 - self.momentum) * mean
        self.rows[instances] = F.normalize(rows, dim=1).to(self.rows.dtype)

    def extra_repr(self) -> str:
        count, dim = self.rows.shape
        return f"num_instances={count}, dim={dim}, momentum={self.momentum}"


_classifiers: weakref.WeakSet[InstanceClassifier] = weakref.WeakSet()


def _refuse_other_optimizers(optimizer: Optimizer, *_: Any) -> None:
    """Runs before any optimiser's step, once there is a classifier whose rows are not all active. One that
    lets `optimizers` of its own take the step is not asked: they are."""
    if isinstance(optimizer, DelayedSGD) or hasattr(optimizer, "optimizers"):
        return
    delayed = {id(c.weight) for c in _classifiers if len(c.weight) < c.num_instances}
    if any(id(parameter) in delayed for group in optimizer.param_groups for parameter in group["params"]):
        name = type(optimizer).__name__
        raise TypeError(
            f"{name} holds the weight of an InstanceClassifier: what it would do to the rows that are not "
            "active cannot be done late. Leave that parameter to DelayedSGD"
        )


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_other_optimizers)


def _check_settings(
    lr: Any, momentum: Any, weight_decay: Any, nesterov: Any
) -> tuple[float, float, float, bool]:
    """Of a step, as numbers; a learning rate may be a tensor of one."""
    lr = float(lr) if isinstance(lr, Tensor) else lr
    check_number("lr", lr, minimum=0)
    check_number("momentum", momentum, minimum=0)
    check_number("weight_decay", weight_decay, minimum=0)
    check_flag("nesterov", nesterov)
    if momentum >= 1:
        raise ValueError(f"momentum must be less than 1, got {momentum}")
    settings = float(lr), float(momentum), float(weight_decay), nesterov
    check_step(*settings)
    return settings
