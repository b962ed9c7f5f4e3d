"""Rows in files come back as they were at a checkpoint, whatever happened since."""

from __future__ import annotations

import errno
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") == "1":
    pytest.importorskip("contrastive_ops._rows")
disk = importlib.import_module("contrastive_ops._disk")
DiskRows = disk.DiskRows

COUNT, DIM, SEED = 7, 3, 5
EVERY = np.arange(COUNT)
State = tuple[np.ndarray, np.ndarray]  # records and steps of all rows


def open_rows(path: Path) -> Any:
    rows = DiskRows(path, COUNT, DIM, np.float32, SEED)
    rows._chunk = 3  # so that a few rows make several blocks
    return rows


def initial(count: int = COUNT, dim: int = DIM) -> State:
    records = np.zeros((count, 2, dim), np.float32)
    disk.initial_rows(SEED, np.arange(count), records[:, 0])
    return records, np.zeros(count, np.int64)


def batch(step: int, count: int = COUNT, dim: int = DIM, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are kept in a step, and what they become."""
    generator = np.random.default_rng(step)
    instances = generator.choice(count, size, replace=False)
    return instances, generator.standard_normal((size, 2, dim), np.float32)


def after(state: State, step: int, *shape: int) -> State:
    records, steps = state[0].copy(), state[1].copy()
    instances, new = batch(step, *shape)
    records[instances], steps[instances] = new, step
    return records, steps


def assert_holds(rows: Any, state: State) -> None:
    records, steps = rows.fetch(np.arange(len(state[1])))
    np.testing.assert_array_equal(steps, state[1])
    np.testing.assert_array_equal(records, state[0])


def play(path: Path, actions: list[str], at: dict[int, State]) -> None:
    """Do as told, and check; `at` gets the state that each generation begins with."""
    rows = open_rows(path)
    now = initial()
    at[1] = now
    for step, action in enumerate(actions, 1):
        if action == "keep":
            instances, records = batch(step)
            rows.keep(instances, records, step)
            now = after(now, step)
        elif action == "checkpoint":
            new = max(at) + 1 if rows.dirty else rows.generation
            at[new] = now
            assert rows.checkpoint() == new
            assert not rows.dirty
        elif action in ("oldest", "newest"):
            generation = rows.generations[0 if action == "oldest" else -1]
            rows.roll_back(generation)
            assert rows.generation == generation
            assert not rows.dirty
            now = at[generation]
        elif action == "reopen":
            held, dirty = rows.generations, rows.dirty
            rows.close()
            rows = open_rows(path)
            assert (rows.generations, rows.dirty) == (held, dirty)
            if dirty:
                with pytest.raises(RuntimeError, match="roll it back first"):
                    rows.fetch(EVERY)
                rows.roll_back(rows.generation)
                now = at[rows.generation]
        assert_holds(rows, now)
    rows.close()


def assert_every_generation_comes_back(path: Path, at: dict[int, State]) -> None:
    with open_rows(path) as rows:
        available = rows.generations
    assert {file.name for file in path.glob("journal.*")} == {f"journal.{number}" for number in available}
    for generation in available:
        shutil.copytree(path, path.with_name("copy"))
        with open_rows(path.with_name("copy")) as rows:
            rows.roll_back(generation)
            assert_holds(rows, at[generation])
            rows.keep(*batch(99), 99)
            rows.roll_back(generation)
            assert_holds(rows, at[generation])
        shutil.rmtree(path.with_name("copy"))


ACTIONS = st.lists(st.sampled_from(["keep", "keep", "keep", "checkpoint", "oldest", "newest", "reopen"]))


@given(actions=ACTIONS)
def test_rows_equal_arrays_and_their_snapshots(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str]
) -> None:
    path, at = tmp_path_factory.mktemp("play") / "rows", {}
    play(path, actions, at)
    assert_every_generation_comes_back(path, at)


class Killed(BaseException):
    """What no handler expects."""


class Fuse:
    """Lets `left` more system calls through that change files, and raises `error` from the next."""

    def __init__(self, error: BaseException, left: float = math.inf) -> None:
        self.error, self.left = error, left

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.left == 0:
                raise self.error
            self.left -= 1
            return function(*args, **options)

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, files are opened that are written in small pieces: the journal by halves of what is left, a
        record by its first number, then the rest."""

        def pwrite(file: int, data: memoryview, at: int, pwrite: Any = os.pwrite) -> int:
            return pwrite(file, data[: len(data) // 2 + 1], at)

        def opened(file: str, mode: str = "r", **options: Any) -> Any:
            return (self.guard(open) if mode.startswith("w") else open)(file, mode, **options)

        class Files(disk.RecordFiles):
            def write(files, indices: np.ndarray, data: np.ndarray) -> None:
                write = self.guard(super().write)
                for i in range(len(indices)):
                    if data.dtype != disk.ENTRY:
                        torn = np.empty_like(data[i : i + 1])
                        files.read(indices[i : i + 1], torn)
                        torn[0, 0, 0] = data[i, 0, 0]
                        write(indices[i : i + 1], torn)
                    write(indices[i : i + 1], data[i : i + 1])

        with (
            mock.patch.object(disk, "RecordFiles", Files),
            mock.patch.object(disk, "open", opened, create=True),
            mock.patch.object(os, "pwrite", self.guard(pwrite)),
            mock.patch.object(os, "replace", self.guard(os.replace)),
            mock.patch.object(os, "ftruncate", self.guard(os.ftruncate)),
            mock.patch.object(os, "unlink", self.guard(os.unlink)),
        ):
            yield


def killed(call: Callable[[], None], calls: int) -> bool:
    """Call it, and kill it after so many system calls; whether it came to that."""
    with Fuse(Killed(), calls).installed():
        try:
            call()
        except Killed:
            for rows in list(disk._opened):
                rows._lock.close()  # as the system does
            return True
    return False


def test_killed_between_any_two_system_calls(tmp_path: Path) -> None:
    """Every moment of a run in which all that there is happens."""
    first, second = ["keep", "keep", "checkpoint"], ["keep", "checkpoint", "keep", "keep"]
    actions = [*first, *second, "oldest", "keep", "checkpoint", "keep", "newest", "keep"]
    for calls in range(1000):
        path, at = tmp_path / str(calls), {1: initial()}
        died = killed(partial(play, path, actions, at), calls)
        assert_every_generation_comes_back(path, at)
        if not died:
            break
    assert calls > 100


@given(actions=ACTIONS, first=st.integers(0, 150), second=st.integers(0, 40))
def test_killed_again_while_rolling_back(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], first: int, second: int
) -> None:
    path, at = tmp_path_factory.mktemp("play") / "rows", {1: initial()}
    killed(partial(play, path, actions, at), first)

    def recover() -> None:
        with open_rows(path) as rows:
            rows.roll_back(rows.generations[0])

    killed(recover, second)
    assert_every_generation_comes_back(path, at)


@pytest.mark.parametrize("again", [True, False])
def test_a_full_disk_loses_nothing(tmp_path: Path, again: bool) -> None:
    """keep fails wherever it can; with space again it succeeds, or everything is rolled back."""
    before = after(initial(), 1)
    for calls in range(1000):
        fuse = Fuse(OSError(errno.ENOSPC, "No space left on device", "some file"))
        with fuse.installed(), open_rows(tmp_path / str(calls)) as rows:
            rows.keep(*batch(1), 1)
            assert rows.checkpoint() == 2
            fuse.left = calls
            try:
                rows.keep(*batch(2), 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                assert error.filename  # noqa: PT017
            failed = fuse.left == 0
            fuse.left = math.inf
            if again:
                rows.keep(*batch(2), 2)
                assert_holds(rows, after(before, 2))
                assert rows.checkpoint() == 3
            rows.roll_back(2)
            assert_holds(rows, before)
        if not failed:
            break
    assert calls > 20


def test_rows_that_may_be_torn_are_neither_fetched_nor_sealed(tmp_path: Path) -> None:
    fuse = Fuse(OSError(errno.ENOSPC, "No space left on device"))
    with fuse.installed(), open_rows(tmp_path) as rows:
        fuse.left = 6
        with pytest.raises(OSError, match="No space"):
            rows.keep(*batch(1, size=3), 1)
        fuse.left = math.inf
        with pytest.raises(RuntimeError, match="3 rows were being written"):
            rows.fetch(EVERY)
        with pytest.raises(RuntimeError, match="3 rows were being written"):
            rows.checkpoint()
        rows.fetch(np.setdiff1d(EVERY, batch(1, size=3)[0]))


def test_a_checkpoint_that_finds_the_disk_full_can_be_made_later(tmp_path: Path) -> None:
    for calls in range(20):
        fuse = Fuse(OSError(errno.ENOSPC, "No space left on device"))
        with fuse.installed(), open_rows(tmp_path / str(calls)) as rows:
            rows.keep(*batch(1), 1)
            fuse.left = calls
            try:
                failed = rows.checkpoint() != 2
            except OSError:
                failed = True
            fuse.left = math.inf
            state = after(initial(), 1)
            if failed:
                rows.keep(*batch(2), 2)
                state = after(state, 2)
                assert rows.checkpoint() == 2
            rows.keep(*batch(3), 3)
            rows.roll_back(2)
            assert_holds(rows, state)
        if not failed:
            break
    assert calls > 3


def test_a_block_that_was_cut_off_does_not_stand_behind_a_shorter_one(tmp_path: Path) -> None:
    fuse = Fuse(OSError(errno.ENOSPC, "No space left on device"))
    with fuse.installed(), open_rows(tmp_path) as rows:
        rows.keep(*batch(1), 1)
        rows.checkpoint()
        fuse.left = 1
        with pytest.raises(OSError, match="No space"):
            rows.keep(*batch(2, size=3), 2)
        fuse.left = math.inf
        rows.keep(*batch(2, size=1), 2)
    with open_rows(tmp_path) as rows:
        rows.roll_back(2)
        assert_holds(rows, after(initial(), 1))


def test_files_over_a_size_limit(tmp_path: Path) -> None:
    """The same as a full disk, from the system itself."""
    with DiskRows(tmp_path, 10**6, DIM, np.float32, SEED) as rows:
        instances = np.array([3, 10**6 - 1])
        records = np.ones((2, 2, DIM), np.float32)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"steps\.00000") as caught:
                rows.keep(instances, records, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        rows.keep(instances, records, 1)
        np.testing.assert_array_equal(rows.fetch(instances)[0], records)
        rows.roll_back(1)
        assert rows.fetch(instances)[1].tolist() == [0, 0]


def in_a_process(call: Callable[..., None], *arguments: Any, seconds: float) -> None:
    """Call it in another process, and kill that with signal 9 after a while."""
    process = multiprocessing.get_context("fork").Process(target=call, args=arguments)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()


SIZES = (3000, 16, 300)  # rows, dimension, rows kept in a step


def open_many(path: Path) -> Any:
    return DiskRows(path, *SIZES[:2], np.float32, SEED)


def train(path: Path) -> None:
    """Go on from the newest checkpoint, of which there is one every five steps."""
    rows = open_many(path)
    rows.roll_back(rows.generation)
    done = int(rows.fetch(np.arange(SIZES[0]))[1].max())
    for step in range(done + 1, 10**6):
        rows.keep(*batch(step, *SIZES), step)
        if step % 5 == 0:
            rows.checkpoint()


def test_kill_9_while_training(tmp_path: Path) -> None:
    states = [initial(*SIZES[:2])]
    random = np.random.default_rng(0)
    for _ in range(10):
        in_a_process(train, tmp_path, seconds=random.uniform(0.02, 0.2))
        with open_many(tmp_path) as rows:
            reached = []
            for generation in reversed(rows.generations):
                rows.roll_back(generation)
                reached.append(int(rows.fetch(np.arange(SIZES[0]))[1].max()))
                while len(states) <= reached[-1]:
                    states.append(after(states[-1], len(states), *SIZES))
                assert_holds(rows, states[reached[-1]])
        assert reached[0] % 5 == 0
        assert reached[1:] in ([], [reached[0] - 5])
    assert len(states) > 50


def roll_back(path: Path) -> None:
    with DiskRows(path, 20_000, DIM, np.float32, SEED) as rows:
        rows.roll_back(2)


def test_kill_9_while_rolling_back(tmp_path: Path) -> None:
    every, record = np.arange(20_000), np.ones((20_000, 2, DIM), np.float32)
    with DiskRows(tmp_path, 20_000, DIM, np.float32, SEED) as rows:
        for step in 1, 2, 3:
            assert rows.checkpoint() == step
            rows.keep(every, step * record, step)
    for milliseconds in range(5, 50, 5):
        in_a_process(roll_back, tmp_path, seconds=milliseconds / 1000)
    roll_back(tmp_path)
    with DiskRows(tmp_path, 20_000, DIM, np.float32, SEED) as rows:
        assert rows.generations == [2]
        assert_holds(rows, (record, np.ones(20_000)))


def hold_and_fork(path: Path, child: Any) -> None:
    rows = open_rows(path)
    if pid := os.fork():
        child.value = pid
    time.sleep(60)
    rows.close()


def test_a_lock_ends_with_its_process_not_with_the_children_of_that(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Value("i", 0)
    in_a_process(hold_and_fork, tmp_path, child, seconds=0.3)
    try:
        open_rows(tmp_path).close()
    finally:
        os.kill(child.value, signal.SIGKILL)


def test_one_opener_at_a_time(tmp_path: Path) -> None:
    with open_rows(tmp_path), pytest.raises(BlockingIOError, match="open elsewhere") as caught:
        open_rows(tmp_path)
    assert caught.value.filename == str(tmp_path)
    open_rows(tmp_path).close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_instances", 8), ("dim", 4), ("dtype", np.float64), ("seed", 6)],
)
def test_other_rows_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    asked = {"num_instances": COUNT, "dim": DIM, "dtype": np.float32, "seed": SEED}
    DiskRows(tmp_path, **asked).close()
    shown = np.dtype(value).name if name == "dtype" else value
    with pytest.raises(ValueError, match=rf"{tmp_path} holds .*{name}=.* but {name}={shown!r} was asked"):
        DiskRows(tmp_path, **asked | {name: value})


@pytest.mark.parametrize(("name", "value"), [("version", 2), ("byte_order", "middle"), ("format", "other")])
def test_other_formats_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    open_rows(tmp_path).close()
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {name: value}))
    with pytest.raises(ValueError, match=f"meta.json is not of rows|holds rows with {name}={value!r}"):
        open_rows(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format": "contrastive_ops.DiskRows"', "\xff"])
@pytest.mark.parametrize("name", ["meta.json", "thesis.tex"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(ValueError, match=name):
        open_rows(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text("latin-1") == content


def test_a_meta_json_without_generations_is_damaged(tmp_path: Path) -> None:
    open_rows(tmp_path).close()
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"generations": []}))
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        open_rows(tmp_path)


def three_generations(path: Path) -> None:
    """Dirty, with checkpoints 2 and 3 to go back to."""
    with open_rows(path) as rows:
        for step in 1, 2:
            rows.keep(*batch(step), step)
            rows.checkpoint()
        rows.keep(*batch(3), 3)


def test_a_generation_that_is_gone_is_refused(tmp_path: Path) -> None:
    three_generations(tmp_path)
    with open_rows(tmp_path) as rows:
        with pytest.raises(ValueError, match=r"to generations \[2, 3\], not to 1"):
            rows.roll_back(1)
        rows.roll_back(3)
        with pytest.raises(ValueError, match=r"to generations \[2, 3\], not to 4"):
            rows.roll_back(4)
        assert_holds(rows, after(after(initial(), 1), 2))  # and it goes on


@pytest.mark.parametrize(
    ("journal", "damage", "message"),
    [
        ("journal.3", lambda data: None, "missing"),
        ("journal.3", lambda data: data[:9], "does not begin as a journal"),
        ("journal.3", lambda data: b"x" + data[1:], "does not begin as a journal"),
        ("journal.3", lambda data: data[:17] + b"x" + data[18:], "damaged before byte"),
        ("journal.3", lambda data: data[:40] + b"x" + data[41:], "damaged before byte"),
        ("journal.2", lambda data: data[:-1], "bytes are left of"),
        ("journal.2", lambda data: None, "missing"),
    ],
)
def test_a_damaged_journal_is_refused(
    tmp_path: Path, journal: str, damage: Callable[[bytes], bytes | None], message: str
) -> None:
    three_generations(tmp_path)
    data = damage((tmp_path / journal).read_bytes())
    if data is None:
        (tmp_path / journal).unlink()
    else:
        (tmp_path / journal).write_bytes(data)

    def recover() -> None:
        with open_rows(tmp_path) as rows:
            rows.roll_back(2)

    with pytest.raises(ValueError, match=rf"{journal} is .*{message}"):
        recover()


def test_a_damaged_old_journal_does_not_bar_the_newest_checkpoint(tmp_path: Path) -> None:
    three_generations(tmp_path)
    (tmp_path / "journal.2").unlink()
    with open_rows(tmp_path) as rows:
        rows.roll_back(3)
        assert_holds(rows, after(after(initial(), 1), 2))


def test_a_billion_rows_take_the_space_of_those_written(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, started = resident(), time.perf_counter()
    with DiskRows(tmp_path, 10**9, 128, np.float32, SEED) as rows:
        assert time.perf_counter() - started < 1
        instances = np.random.default_rng(0).choice(10**9, 100, replace=False)
        records, steps = rows.fetch(instances)
        np.testing.assert_allclose(np.linalg.norm(records[:, 0], axis=1), 1, rtol=1e-6)
        assert not records[:, 1].any()
        assert not steps.any()
        rows.keep(instances, records + 1, 2**32 - 1)
        found, steps = rows.fetch(instances)
        np.testing.assert_array_equal(found, records + 1)
        assert (steps == 2**32 - 1).all()
        assert rows.checkpoint() == 2
    assert resident() - before < 32 << 20
    # A page for each record and one for each entry, and the file system's own.
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 100 * 8192 + (4 << 20)


def test_a_checkpoint_after_nothing_is_the_same(tmp_path: Path) -> None:
    with open_rows(tmp_path / "deep" / "rows") as rows:
        assert (rows.checkpoint(), rows.generations, rows.dirty) == (1, [1], False)
        rows.keep(*batch(1), 1)
        assert (rows.generation, rows.dirty) == (1, True)
        assert (rows.checkpoint(), rows.checkpoint(), rows.generations) == (2, 2, [1, 2])


@pytest.mark.parametrize(
    ("instances", "records", "step", "error", "message"),
    [
        (np.arange(2), np.zeros((3, 2, DIM), np.float32), 1, ValueError, r"\(2, 2, 3\) of float32, got \(3"),
        (np.arange(2), np.zeros((2, 2, DIM)), 1, ValueError, "float32, got .* of float64"),
        (np.arange(2), np.zeros((2, 2, DIM), np.float32), 2**32, ValueError, "step"),
        (np.zeros(2, np.int64), np.zeros((2, 2, DIM), np.float32), 1, ValueError, "distinct"),
        (np.arange(6, 8), np.zeros((2, 2, DIM), np.float32), 1, ValueError, r"\[0, 7\)"),
        (np.arange(2, dtype=np.int32), np.zeros((2, 2, DIM), np.float32), 1, TypeError, "int64"),
    ],
)
def test_keep_refuses(
    tmp_path: Path,
    instances: np.ndarray,
    records: np.ndarray,
    step: int,
    error: type[Exception],
    message: str,
) -> None:
    with open_rows(tmp_path) as rows:
        with pytest.raises(error, match=message):
            rows.keep(instances, records, step)
        assert not rows.dirty


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be in .*, got {seed}"):
        DiskRows(tmp_path / "rows", COUNT, DIM, np.float32, seed)
    assert not list(tmp_path.iterdir())


def test_a_closed_folder_refuses(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    rows.close()
    rows.close()
    for call in (partial(rows.fetch, EVERY), rows.checkpoint, partial(rows.roll_back, 1)):
        with pytest.raises(ValueError, match="was closed"):
            call()
