"""What the host's tier asks of CUDA: memory is pinned as long as it is there, and nobody waits in vain. The
runtime is a fake one, which counts; `tests/test_gpu.py` has the real one."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.classifiers import classifier

if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") == "1":
    pytest.importorskip("contrastive_ops._store")
from contrastive_ops.classifier.storage import MemoryStore

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ALREADY_REGISTERED = 712


class Event:
    """Of work that ends when it is waited for, or `done` is set."""

    def __init__(self) -> None:
        self.done, self.waits = False, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True
        self.waits += 1


class Runtime:
    """CUDA, as far as a store calls it.

    Attributes:
        pinned: start and size of what is registered.
        log: the names of the calls that change something, or wait.
        events: those recorded on the stream that is current.
    """

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.log: list[str] = []
        self.events: list[Event] = []
        self.side: list[Any] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self.log.append("register")
        if any(start < at + length and at < start + size for at, length in self.pinned.items()):
            return ALREADY_REGISTERED
        self.pinned[start] = size
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        self.log.append("unregister")
        return 0 if self.pinned.pop(start, 0) else 713

    def cudaGetErrorString(self, status: int) -> str:
        return {ALREADY_REGISTERED: "resource already mapped"}.get(status, "unknown error")

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_event(self, event: Event) -> None:
        self.log.append("wait_event")

    def synchronize(self, device: Any = None) -> None:
        self.log.append("synchronize")


class Side:
    """The side stream."""

    def __init__(self) -> None:
        self.event = Event()

    def record_event(self) -> Event:
        return self.event


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    to: Callable[..., Tensor] = Tensor.to

    def fake_to(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if arguments and arguments[0] == GPU:
            assert options.get("non_blocking"), "a copy that waits"
            return tensor.clone()
        return to(tensor, *arguments, **options)

    def device(which: Any) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "stream", device)
    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.synchronize)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: runtime.log.append("record_stream"))
    monkeypatch.setattr(Tensor, "to", fake_to)
    return runtime


def indices(*instances: int) -> np.ndarray:
    return np.array(instances, np.int64)


def store(count: int = 30) -> MemoryStore:
    return MemoryStore(count, 4, torch.float32, seed=1, on_host=True)


def unmoved(records: Tensor) -> Tensor:
    return records


def test_memory_is_unpinned_when_it_is_moved_or_freed(cuda: Runtime) -> None:
    of = store()
    for _ in range(2):
        of.move(GPU, unmoved)
        of.move(GPU, unmoved)
        assert len(cuda.pinned) == 1
        of.move(CPU, unmoved)
        assert not cuda.pinned
    of.move(GPU, unmoved)
    of.move(torch.device("cuda", 1), unmoved)
    assert len(cuda.pinned) == 1
    cuda.log.clear()
    del of
    gc.collect()
    assert not cuda.pinned
    assert cuda.log == ["synchronize", "unregister"]  # in this order


def test_memory_stays_mapped_until_it_is_unpinned(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finalizer holds it, whoever else lets go."""
    of = store()
    of.move(GPU, unmoved)
    before = Path("/proc/self/maps").read_text().count("\n") if Path("/proc/self/maps").exists() else None
    address, mapped = of._records.data_ptr(), []

    def unregister(start: int) -> int:
        mapped.append(of_address(start))
        return Runtime.cudaHostUnregister(cuda, start)

    def of_address(start: int) -> bool:
        if before is None:
            return True
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(first, 16) <= start < int(last, 16) for first, last in spans)

    monkeypatch.setattr(cuda, "cudaHostUnregister", unregister)
    assert of_address(address)
    del of
    gc.collect()
    assert mapped == [True]


def test_copies_pin_their_own(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    of = store()
    of.move(GPU, unmoved)
    copies = [copy.deepcopy(of), pickle.loads(pickle.dumps(of)), copy.copy(of)]
    assert len(cuda.pinned) == 4
    del of, copies
    gc.collect()
    assert not cuda.pinned
    assert cuda.log.count("unregister") == 4


def test_what_cannot_be_pinned_is_said_by_name_and_changes_nothing(cuda: Runtime) -> None:
    of = store()
    cuda.pinned[of._records.data_ptr()] = 1
    for _ in range(2):
        message = r"storage='host': cudaHostRegister failed for the rows' 960 bytes: error 712, resource"
        with pytest.raises(RuntimeError, match=message):
            of.move(GPU, unmoved)
    cuda.pinned.clear()
    of.move(GPU, unmoved)
    assert len(cuda.pinned) == 1
    cuda.pinned.clear()
    with pytest.raises(RuntimeError, match="cudaHostUnregister failed"):
        of.move(CPU, unmoved)


def test_another_process_does_not_unpin(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    of = store()
    of.move(GPU, unmoved)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del of
    gc.collect()
    assert len(cuda.pinned) == 1


def test_an_interpreter_exits_while_memory_is_pinned() -> None:
    """When nothing can be unpinned any more: nothing is, and nobody complains."""
    program = """
import torch
from types import SimpleNamespace
from contextlib import nullcontext
from contrastive_ops.classifier.storage import MemoryStore
def never(*_): raise RuntimeError("CUDA is gone")
torch.cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=never)
torch.cuda.device, torch.cuda.synchronize = nullcontext, never
store = MemoryStore(30, 4, torch.float32, seed=1, on_host=True)
store.move(torch.device("cuda", 0), None)
store.cycle = store
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert not done.stderr


def test_prefetch_waits_for_no_more_than_writes_to_its_rows(cuda: Runtime) -> None:
    of = store()
    of.move(GPU, unmoved)
    for step, evicted in enumerate([(1, 2), (3, 4), (5, 6)]):
        of.commit(indices(*evicted), step)
    of.prefetch(indices(9, 7))
    assert [event.waits for event in cuda.events] == [0, 0, 0]
    of.prefetch(indices(9, 4))
    assert [event.waits for event in cuda.events] == [0, 1, 0]
    assert "synchronize" not in cuda.log
    of.state_dict()
    assert all(event.waits for event in cuda.events)


def test_writes_that_have_ended_are_forgotten(cuda: Runtime) -> None:
    of = store()
    of.move(GPU, unmoved)
    for step in range(20):
        of.commit(indices(step), step)
        cuda.events[-1].done = True
    assert len(of._writes) == 1


def test_what_was_prefetched_is_ordered_behind_its_copy(cuda: Runtime) -> None:
    of = store()
    of.move(GPU, unmoved)
    expected, _ = of.peek(indices(7, 9, 3))
    of.prefetch(indices(9, 7, 3))
    cuda.log.clear()
    records, steps = of.fetch(indices(7, 9, 3))
    assert cuda.log == ["wait_event", "record_stream"]
    assert records.values is not of._records
    assert torch.equal(records.values[torch.from_numpy(records.at)], expected)
    assert not steps.any()


def test_rows_that_were_written_since_are_not_taken_as_prefetched(cuda: Runtime) -> None:
    of = store()
    of.move(GPU, unmoved)
    of.prefetch(indices(7, 9))
    of._records[7] = 5
    of.commit(indices(7), 3)
    records, steps = of.fetch(indices(7, 9))
    assert (records.values[records.at[0]] == 5).all()
    assert steps.tolist() == [3, 0]


def test_what_was_prefetched_is_left_behind_by_a_move(cuda: Runtime) -> None:
    of = store()
    of.move(GPU, unmoved)
    of.prefetch(indices(7, 9))
    of.move(CPU, unmoved)
    records, _ = of.fetch(indices(7, 9))
    assert records.values is of._records


def test_a_disk_reads_again_what_was_prefetched_for_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU cannot reach what was read into the host's other memory."""
    pytest.importorskip("rocksdict")
    of = classifier("disk", tmp_path)
    disk = of._storage
    (late,) = np.nonzero(of._active.find(np.arange(of.num_instances)) < 0)
    reads: list[bool] = []
    empty = torch.empty

    def fake_empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        reads.append(pin_memory)
        return empty(*arguments, **options)

    disk.prefetch(late[:3])
    monkeypatch.setattr(torch, "empty", fake_empty)
    disk.move(GPU, unmoved)
    disk.fetch(late[:3])
    assert reads == [True]
    of.close()
