"""The classifier with a row for every instance."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _ops
from .._checks import check_floating, check_integer
from .._contract import SGDSettings
from .._eager import eager
from .._state import entry, tensor
from ..functional import SGDStep
from .history import History
from .indices import STATEFUL, Indices, checked_instances
from .late import updated_late

try:
    from .. import _store
except ImportError as error:  # it was not built: the losses work without it
    _missing: ImportError | None = error
else:
    from .storage import MemoryStore, Storage

    _missing = None


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
        generations: how many checkpoints of storage="disk" can be loaded: those taken last, beside the one
            that was confirmed.

    Attributes:
        weight: (A, D) parameter, the active rows, not normalised.
        momentum: (A, D) buffer, theirs.
        carried: None, or while a gradient is accumulated over several batches, a parameter (n, D) for rows
            that were evicted meanwhile. Its ``grad`` is what they have to their credit at the next step, for
            loss scalers and clipping to see; it has no values of interest. A list of parameters that was
            made before does not have it.

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
        active = min(active, num_instances)
        self.num_instances, self.dim, self.seed, self.storage = num_instances, dim, seed, storage
        self.history = History()
        self._active = _store.ActiveSet(num_instances, active, seed)
        device = torch.empty(0, device=device).device
        self._storage: Storage
        if path is not None:
            from .disk import DiskStore  # not everywhere is there a lock of files, as it needs

            self._storage = DiskStore(path, num_instances, dim, dtype, seed, generations)
        else:
            stored = num_instances if active < num_instances else 0
            self._storage = MemoryStore(stored, dim, dtype, seed, on_host=storage == "host")

        rows = torch.empty(active, dim, dtype=dtype, device="cpu")
        _store.initial_rows(seed, self._active.instances, rows.numpy())
        self.weight = nn.Parameter(rows)
        self.register_buffer("momentum", torch.zeros_like(rows))
        self.register_parameter("carried", None)
        self._carried: _Carried | None = None
        self._trained: list[nn.Parameter] = [self.weight]  # what optimisers hold: with `carried`, if there is
        self._in_backward: SGDStep | None = None  # until step() closes it
        self._unfinished: Callable[[], None] | None = None  # completes or undoes what was cut off
        self._stepping: _Gradient | None = None  # of a step() that has not returned
        self._spent: _Gradient | None = None  # that of the last step
        self._hook: RemovableHandle | None = None
        self._accumulated = False  # whether a backward has, since rows were last freed
        self._launching = False  # whether an operator was called that has not returned
        self._torn = ""  # why there is no going on without a checkpoint
        self._lock = threading.RLock()
        self._mark()
        self.to(device)

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
                since the optimiser's last step than fit.
            OSError: the disk failed, or is full. Nothing is lost: the active set is as it was.
        """
        protect = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        with self._exclusively():
            self._stepping = None
            if self._hook is None and self.weight.requires_grad:
                self._hook = self.weight.register_post_accumulate_grad_hook(
                    partial(_has_accumulated, weakref.ref(self))
                )
            plan = self._active.plan(checked_instances("indices", indices, self.num_instances))
            if len(plan.slots):
                self._bring_in(plan)
            self._active.commit(plan, protect)
            self._unfinished = None
            return self._to_device(plan.target)

    @eager(STATEFUL)
    def prefetch(self, next_indices: Tensor) -> None:
        """Start to bring the rows of the next batch near, while the current step computes.

        Changes nothing but how long the next `activate` takes. Call it after this step's `activate`, with
        what the next one is going to be called with.
        """
        with self._exclusively():
            indices = np.unique(checked_instances("next_indices", next_indices, self.num_instances))
            self._storage.prefetch(indices[self._active.find(indices) < 0])

    @eager(STATEFUL)
    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and momentum of any instances (n,), caught up to now, without activating them: two (n, D)
        tensors on the weight's device."""
        with self._exclusively():
            instances = checked_instances("indices", indices, self.num_instances)
            slots = self._active.find(instances)
            at = self._to_device(np.maximum(slots, 0))
            weight, momentum = self.weight.detach()[at], self.momentum[at]
            (late,) = np.nonzero(slots < 0)
            if len(late):
                at = self._to_device(late)
                weight[at], momentum[at] = self._caught_up(instances[late])
            return weight, momentum

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
        instances = checked_instances("indices", indices, self.num_instances)
        if len(np.unique(instances)) < len(instances):
            raise ValueError("indices must be distinct")
        momentum = torch.zeros_like(weight) if momentum is None and isinstance(weight, Tensor) else momentum
        wanted = (len(instances), self.dim)
        for name, rows in (("weight", weight), ("momentum", momentum)):
            check_floating(name, rows)
            if rows.shape != wanted or rows.is_meta:
                raise ValueError(f"{name} must be {wanted} and have values, got {tuple(rows.shape)}")
        records = torch.stack([weight.detach().to(self.weight), momentum.detach().to(self.weight)], 1)
        with self._exclusively():
            self._unfinished = partial(self._overwrite, instances, records, len(self.history))
            self._settle()

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
        """Say that a file with this state, which `state_dict` returned, is safely saved: with storage="disk"
        it can be loaded until another one is confirmed, however many are taken meanwhile.

        Raises:
            ValueError: the state is not of this classifier, or its generation is gone.
        """
        with self._lock:
            self._storage.confirm(entry(entry(state, "_extra_state", "state"), "storage", "classifier"))

    def verify(self) -> list[str]:
        """Read all that storage="disk" has in its folder, and say what is damaged; [] where all is well."""
        with self._lock:
            return self._storage.verify()

    @staticmethod
    def verify_folder(path: str | os.PathLike[str]) -> list[str]:
        """The same of a folder that no classifier has open."""
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
        with self._exclusively():
            state = {**self.__dict__, "_active": self._active.state()}
            for name in ("_lock", "_carried", "_hook", "_stepping", "_spent"):
                del state[name]
            if self._in_backward is not None:
                state["_in_backward"] = replace(self._in_backward, lock=contextlib.nullcontext())
            state["_parameters"] = {**state["_parameters"], "carried": None}
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
        self._hook = self._stepping = self._spent = None
        if self._in_backward is not None:
            self._in_backward.lock = self._lock
        self._publish(None)
        self._active = _store.ActiveSet(self.num_instances, len(self.weight), self.seed)
        self._active.load(state["_active"])
        self._mark()

    def _mark(self) -> None:
        """Have the weight refused by optimisers that would leave out the rows that are not active."""
        if len(self.weight) < self.num_instances:
            updated_late(self.weight, by="DelayedSGD")

    def get_extra_state(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "active": {name: torch.from_numpy(value) for name, value in self._active.state().items()},
            "history": self.history.state_dict(),
            "storage": self._storage.state_dict(),
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """All of it as of one moment: rows are copies, as the rest is."""
        with self._exclusively():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}carried", None)
            for name in ("weight", "momentum"):
                if not keep_vars:
                    destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].clone()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        """All of a checkpoint, or nothing. Rows are copied into the tensors that the optimiser holds, also
        where ``assign=True`` asks for others."""
        names = ("weight", "momentum", "_extra_state")
        given = [name for name in names if f"{prefix}{name}" in state_dict]
        if not given:  # missing as a whole, which is for PyTorch to say
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
            return
        for name in names:
            if name not in given:
                raise ValueError(f"the checkpoint must hold the classifier's {prefix}{name} with the others")
        if self.weight.is_meta:
            raise ValueError("the classifier is on the meta device: move it by to_empty() before loading")
        with self._lock:
            self._checked(state_dict[f"{prefix}_extra_state"])
            for name in ("weight", "momentum"):
                shape = tuple(self.weight.shape)
                tensor(state_dict, f"{prefix}{name}", "classifier", self.weight.dtype, shape, finite=False)
            self._torn = "loading a checkpoint was interrupted"
            self._publish(None)
            metadata = {**local_metadata, "assign_to_params_buffers": False}
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            active, history = self._checked(state)
            self._torn = "loading a checkpoint was interrupted"
            self._publish(None)
            self.weight.grad = None
            self._withdraw()
            self._unfinished = self._stepping = None
            self._storage.load_state_dict(state["storage"])
            self._active, self.history = active, history
            self._torn = ""

    def _checked(self, state: Mapping[str, Any]) -> tuple[_store.ActiveSet, History]:
        """The active set and the history of a state that can be loaded.

        Raises:
            ValueError: it cannot.
        """
        of = "classifier"
        for name, here in self._identity().items():
            if entry(state, name, of) != here:
                raise ValueError(f"the checkpoint's {name} is {state[name]}, the classifier's {here}")
        history = History.from_state(entry(state, "history", of))
        active = _store.ActiveSet(self.num_instances, len(self.weight), self.seed)
        parts = entry(state, "active", of)
        sizes = {"instances": len(self.weight), "order": len(self.weight), "protected": 1}
        tensors = {
            name: tensor(parts, name, "active set", torch.int64, (size,)) for name, size in sizes.items()
        }
        active.load({name: value.cpu().contiguous().numpy() for name, value in tensors.items()})
        self._storage.check(entry(state, "storage", of), len(history))
        return active, history

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
        weight = self.weight
        super()._apply(fn, recurse)
        if self.weight is not weight:  # as PyTorch may be set to have it
            self._trained[0], self._hook = self.weight, None
        self._mark()
        self._storage.move(probe.device, fn)
        return self

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Alone, from a settled state to a settled state, whatever comes between.

        Tensors are written to detached from autograd, rather than with gradients switched off, which an
        interrupt at the wrong moment would leave off.
        """
        with self._lock:
            self._settle()
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # it will be tried again, and say so then
                    self._settle()
                raise

    def _settle(self) -> None:
        """Complete or undo what an exception has cut off, and record a step that backward has taken.

        May be cut off itself, at any place, and be called again.
        """
        if self._torn:
            raise RuntimeError(f"{self._torn}: load a checkpoint to go on")
        if self._unfinished is not None:
            self._unfinished()
            self._unfinished = None
        self._launching = False
        step = self._in_backward
        if step is not None and (step.taken or (step.begun and self._was_written(step.begun, launched=True))):
            step.taken = True
            if step.recorded is None:
                step.recorded = len(self.history)
            self._record(step.recorded, (step.lr, step.momentum, step.weight_decay, step.nesterov))
        whole = self.weight.grad
        if whole is None and self._accumulated:
            self._release()  # it was thrown away, by whoever: as by the optimiser
        if self._carried is not None:
            if whole is None or not self._holds_part_of(whole):
                self._publish(None)
            else:
                self._carried.part_of = weakref.ref(whole)

    def _release(self) -> None:
        """Rows may be evicted: no gradient waits for them to come back to."""
        self._active.release()
        self._accumulated = False

    def _withdraw(self) -> None:
        """No backward takes the step any more that it was told to."""
        if self._in_backward is not None:
            self._in_backward.withdrawn = True
            self._in_backward = None

    def _was_written(self, versions: tuple[int, int], launched: bool) -> bool:
        """Whether an operator has written weight and momentum since they had these versions; `launched` says
        that it was called."""
        momentum, weight = versions
        if self.weight._version != weight:
            return True
        if self.momentum._version != momentum or (launched and _runs_ahead(self.weight)):
            self._torn = "an interrupt came while rows were being written, and some may be"
            raise RuntimeError(f"{self._torn}: load a checkpoint to go on")
        return False

    def _versions(self) -> tuple[int, int]:
        """Of momentum and weight. An operator moves them on when it has written both, the weight's last."""
        return self.momentum._version, self.weight._version

    def _bring_in(self, plan: _store.Plan) -> None:
        """Exchange rows, and their gradients; `_unfinished` undoes it until the plan is committed."""
        incoming, coming, steps = self._storage.fetch(plan.incoming)
        coefficients = self.history.coefficients(steps)
        room, going = self._storage.room(plan.evicted)
        exchange = _Exchange(plan, room, going, self._versions(), self._carried)
        gradient = self.weight.grad
        if gradient is not None:
            exchange.slots = self._to_device(plan.slots)
            exchange.gradient = gradient.detach()[exchange.slots]
            exchange.spent = self._is_spent(gradient)
            carried, arriving = self._carry(exchange, gradient)
        self._unfinished = partial(self._undo, exchange)
        rows = self.weight, self.momentum
        self._exchange(*rows, plan.slots, incoming, coming, coefficients, room, going)
        if gradient is not None:
            self._change_gradient(exchange, arriving)
            self._publish(carried)
        self._storage.keep(plan.evicted, len(self.history))

    def _undo(self, exchange: _Exchange) -> None:
        plan = exchange.plan
        if not self._active.awaits(plan) or not self._was_written(exchange.versions, self._launching):
            return  # it was committed, or nothing was written
        every, unchanged = np.arange(len(plan.slots)), np.tile(np.eye(2), (len(plan.slots), 1, 1))
        scratch = self.weight.new_empty(len(plan.slots), 2, self.dim)
        rows, going = (self.weight, self.momentum), exchange.going
        self._exchange(*rows, plan.slots, exchange.room, going, unchanged, scratch, every)
        if exchange.gradient is not None:
            self._change_gradient(exchange, exchange.gradient)
        self._publish(exchange.carried)

    def _change_gradient(self, exchange: _Exchange, rows: Tensor) -> None:
        """Give the slots that change hands these rows of gradient. One that was spent stays so."""
        gradient = self.weight.grad
        if gradient is not None:
            gradient.detach()[exchange.slots] = rows
            self._spent = _Gradient.of(gradient) if exchange.spent else None

    def _carry(self, exchange: _Exchange, whole: Tensor) -> tuple[_Carried, Tensor]:
        """What is carried after an exchange, and the gradient (n, D) of the rows that come in."""
        assert exchange.gradient is not None
        arriving = torch.zeros_like(exchange.gradient)
        instances, gradients = exchange.plan.evicted, exchange.gradient
        if self._carried is not None:
            _, back, of = np.intersect1d(exchange.plan.incoming, self._carried.instances, return_indices=True)
            arriving[self._to_device(back)] = self._carried.gradient[self._to_device(of)]
            stay = np.setdiff1d(np.arange(len(self._carried.instances)), of)
            instances = np.concatenate([self._carried.instances[stay], instances])
            gradients = torch.cat([self._carried.gradient[self._to_device(stay)], gradients])
        with torch.inference_mode(False):  # an evaluation between two batches may have switched it on
            parameter = nn.Parameter(torch.zeros_like(gradients), requires_grad=False)
            parameter.grad = gradients.clone() if gradients.is_inference() else gradients
        return _Carried(instances, parameter, weakref.ref(whole), exchange.spent), arriving

    def _publish(self, carried: _Carried | None) -> None:
        """Where loss scalers, clipping and `zero_grad` look for parameters, until a step has spent it:
        those who go through parameters then, such as averages of a model, have no use for it."""
        parameter = None if carried is None or carried.spent else carried.parameter
        self._parameters["carried"] = parameter
        self._trained[1:] = [] if parameter is None else [parameter]
        self._carried = carried  # last: if an interrupt comes before, all of it is done again

    def _is_spent(self, gradient: Tensor) -> bool:
        """Whether it is as the last step left it."""
        return self._spent is not None and self._spent.is_still(gradient)

    def _holds_part_of(self, whole: Tensor) -> bool:
        """Whether the weight's gradient is the one that evicted rows have a part in. If it waits for a step,
        another tensor in its place is a sum with it; if spent, whatever is written to it begins anew."""
        carried = self._carried
        assert carried is not None
        return carried.parameter.grad is not None and (not carried.spent or self._is_spent(whole))

    def _take_step_on_gradient(self, settings: SGDSettings) -> None:
        """A step with the gradients of active rows, and those of evicted ones."""
        grad = self.weight.grad
        assert grad is not None
        step = _Step(settings, len(self.history), self._versions(), _Gradient.of(grad))
        if self._carried is not None:
            step.evicted = self._carried.instances
            weight, momentum = self._caught_up(step.evicted)
            _ops.sgd_(weight, momentum, self._carried.gradient, *settings, None)
            step.records = torch.stack([weight, momentum], 1)
        self._unfinished = partial(self._finish_interrupted, step)
        self._stepping = step.gradient
        self._launching = True
        _ops.sgd_(self.weight.detach(), self.momentum, grad.detach(), *settings, None)
        self._launching = False
        self._finish(step)
        self._unfinished = None

    def _finish(self, step: _Step) -> None:
        """What is left when the active rows have taken a step."""
        if step.records is not None:
            self._overwrite_stored(step.evicted, step.records, step.length + 1)
        self._spent = step.gradient
        if self._carried is not None:
            self._carried.spent = True
            self._publish(self._carried)
        self._record(step.length, step.settings)

    def _finish_interrupted(self, step: _Step) -> None:
        if self._was_written(step.versions, self._launching):
            self._finish(step)
        else:
            self._stepping = None

    def _record(self, length: int, settings: SGDSettings) -> None:
        """The step after the first `length` was taken, by the active rows; the others will. Once."""
        if len(self.history) == length:
            self._release()
            self.history.append(*settings)

    def _take_step(self, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        """The active rows have taken a step; the others will."""
        self._record(len(self.history), (lr, momentum, weight_decay, nesterov))

    def _caught_up(self, instances: Indices) -> tuple[Tensor, Tensor]:
        """Weight and momentum (n, D) of instances that are not active."""
        records, steps = self._storage.peek(instances)
        records = records.to(self.weight.device)
        every, room = np.arange(len(instances)), torch.empty_like(records)
        weight, momentum = records[:, 0].clone(), records[:, 1].clone()
        coefficients = self.history.coefficients(steps)
        self._exchange(weight, momentum, every, records, every, coefficients, room, every)
        return weight, momentum

    def _overwrite(self, instances: Indices, records: Tensor, step: int) -> None:
        slots = self._active.find(instances)
        late, active = slots < 0, slots >= 0
        if late.any():
            self._overwrite_stored(instances[late], records[self._to_device(late)], step)
        at = self._to_device(slots[active])
        self.weight.detach()[at], self.momentum[at] = records[self._to_device(active)].unbind(1)

    def _overwrite_stored(self, instances: Indices, records: Tensor, step: int) -> None:
        """Overwrite the stored records of instances that are not active."""
        room, rows = self._storage.room(instances)
        room[torch.from_numpy(rows).to(room.device)] = records.to(room.device)
        self._storage.keep(instances, step)

    def _exchange(
        self,
        weight: Tensor,
        momentum: Tensor,
        slots: Indices,
        incoming: Tensor,
        incoming_rows: Indices,
        coefficients: NDArray[np.float64],
        outgoing: Tensor,
        outgoing_rows: Indices,
    ) -> None:
        """The operator, with arrays of the host."""
        weight = weight.detach()
        at, source, matrices, target = map(
            self._to_device, (slots, incoming_rows, coefficients, outgoing_rows)
        )
        self._launching = True
        _ops.exchange_rows_(weight, momentum, at, incoming, source, matrices, outgoing, target, None)
        self._launching = False

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.weight.device, non_blocking=True)

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"num_instances={self.num_instances}, dim={dim}, active={rows}, storage={self.storage!r}"


@dataclass(frozen=True)
class _Gradient:
    """A gradient as it was at a moment, without keeping it alive.

    Attributes:
        tensor: a weak reference to it.
        version: how often it had been written.
    """

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, gradient: Tensor) -> _Gradient:
        return cls(weakref.ref(gradient), gradient._version)

    def is_still(self, gradient: Tensor | None) -> bool:
        return gradient is not None and self.tensor() is gradient and self.version == gradient._version


@dataclass
class _Carried:
    """Rows that were evicted while they had a gradient.

    Attributes:
        instances: (n,) whose they are.
        parameter: (n, D), whose ``grad`` is theirs.
        part_of: the weight's gradient that it is a part of.
        spent: whether a step has been taken on it, and nothing been added since.
    """

    instances: Indices
    parameter: nn.Parameter
    part_of: weakref.ref[Tensor]
    spent: bool

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad


@dataclass
class _Exchange:
    """An exchange of rows that may have to be undone.

    Attributes:
        plan: what it is for.
        room, going: the storage's records, and which of them are the evicted rows.
        versions: of momentum and weight before.
        carried: what was carried before.
        slots, gradient: the rows' gradient (n, D) before, if there is one.
        spent: whether a step had been taken on it.
    """

    plan: _store.Plan
    room: Tensor
    going: Indices
    versions: tuple[int, int]
    carried: _Carried | None
    slots: Tensor | None = None
    gradient: Tensor | None = None
    spent: bool = False


@dataclass
class _Step:
    """A step on a gradient that may have to be completed.

    Attributes:
        settings: learning rate, momentum, weight decay, nesterov.
        length: of the history before.
        versions: of momentum and weight before.
        gradient: the weight's.
        evicted, records: instances with a gradient that are not active, and their rows (n, 2, D) after it.
    """

    settings: SGDSettings
    length: int
    versions: tuple[int, int]
    gradient: _Gradient
    evicted: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    records: Tensor | None = None


def _runs_ahead(tensor: Tensor) -> bool:
    """Whether a GPU has it, which is given its work and goes on by itself: an exception out of the call then
    leaves open whether it had come to that."""
    return tensor.is_cuda


def _has_accumulated(of: weakref.ref[InstanceClassifier], weight: Tensor) -> None:
    """Runs when a backward has added to the weight's gradient. If that is not what evicted rows have a part
    in, or was written to since it was spent, then theirs was thrown away in between."""
    classifier, whole = of(), weight.grad
    if classifier is None or whole is None:
        return
    classifier._accumulated = True
    carried, spent = classifier._carried, classifier._spent
    if carried is None:
        return
    if torch.is_grad_enabled():  # create_graph=True: the sum is another tensor
        carried.part_of = weakref.ref(whole)
    elif carried.part_of() is not whole or (carried.spent and spent and whole._version != spent.version + 1):
        carried.parameter.grad = None
        return
    carried.spent = False
    classifier._publish(carried)
