"""Rows on disk come back as they were at a generation, whatever happened since."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.classifier import power

if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") == "1":
    pytest.importorskip("contrastive_ops._store")
pytest.importorskip("rocksdict")
database, disk, folder = (
    importlib.import_module(f"contrastive_ops.classifier.{name}") for name in ("database", "disk", "folder")
)

COUNT, DIM, SEED = 40, 3, 5
State = tuple[np.ndarray, np.ndarray]  # records and steps of all rows


@pytest.fixture(autouse=True)
def _small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows make several tables, which are written while the next one fills."""
    monkeypatch.setattr(database, "TABLE_BYTES", 10 * (8 + 2 * DIM * 4))


def open_rows(path: Path, count: int = COUNT, dim: int = DIM, **arguments: Any) -> Any:
    return disk.DiskStore(path, count, dim, torch.float32, SEED, **arguments)


def initial(count: int = COUNT, dim: int = DIM) -> State:
    records = np.zeros((count, 2, dim), np.float32)
    disk.initial_rows(SEED, np.arange(count), records[:, 0])
    return records, np.zeros(count, np.int64)


def batch(step: int, count: int = COUNT, dim: int = DIM, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are kept in a step, and what they become."""
    generator = np.random.default_rng(step)
    instances = generator.choice(count, size, replace=False)
    return instances, generator.standard_normal((size, 2, dim), np.float32)


def after(state: State, step: int, *shape: int) -> State:
    records, steps = state[0].copy(), state[1].copy()
    instances, new = batch(step, *shape)
    records[instances], steps[instances] = new, step
    return records, steps


def commit(rows: Any, step: int, *shape: int) -> None:
    instances, records = batch(step, *shape)
    reserved, at = rows.reserve(instances)
    reserved[at] = torch.from_numpy(records)
    rows.commit(instances, step)


def assert_holds(rows: Any, state: State, read: str = "peek") -> None:
    every = np.arange(len(state[1]))
    if read == "peek":
        records, steps = rows.peek(every)
    else:
        (records, at), steps = rows.fetch(every)
        records = records[at]
    np.testing.assert_array_equal(steps, state[1])
    np.testing.assert_array_equal(records.numpy(), state[0])


def holds(rows: Any, state: State) -> bool:
    records, steps = rows.peek(np.arange(len(state[1])))
    return np.array_equal(records.numpy(), state[0]) and np.array_equal(steps, state[1])


def numbers(rows: Any) -> list[int]:
    return rows._folder.generations


# Against arrays

ACTIONS = st.lists(
    st.sampled_from(
        ["commit", "commit", "commit", "state", "confirm", "load", "reopen", "prefetch", "fetch"]
    ),
    max_size=25,
)


@pytest.mark.filterwarnings("ignore:.*none of which was confirmed")
@settings(max_examples=25)
@given(actions=ACTIONS, choices=st.randoms(use_true_random=False), kept=st.integers(1, 3))
def test_rows_equal_arrays_and_their_snapshots(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], choices: Any, kept: int
) -> None:
    path = tmp_path_factory.mktemp("play") / "rows"
    rows, now = open_rows(path, generations=kept), initial()
    taken: dict[int, tuple[Any, State]] = {}  # of each generation the state and what the rows were
    known: dict[str, int | None] = {"confirmed": None, "loaded": None}
    for step, action in enumerate(actions, 1):
        expected = {*sorted(taken)[-kept:], *(number for number in known.values() if number in taken)}
        if action == "commit":
            commit(rows, step)
            now = after(now, step)
        elif action == "state":
            state = rows.state_dict()
            if state["generation"] in taken:
                assert state["generation"] == max(taken)
                np.testing.assert_array_equal(taken[max(taken)][1][0], now[0])
            taken[state["generation"]] = state, now
            expected = {*sorted(taken)[-kept:], *(number for number in known.values() if number in taken)}
            assert set(numbers(rows)) == expected
        elif action == "confirm" and expected:
            number = choices.choice(sorted(expected))
            rows.confirm(taken[number][0])
            known = {"confirmed": number, "loaded": None}
        elif action == "load" and taken:
            number = choices.choice(sorted(expected))
            rows.load_state_dict(taken[number][0])
            now, known["loaded"] = taken[number][1], number
        elif action == "reopen":
            rows.close()
            rows = open_rows(path, generations=kept)
            now = initial()
            if any(known.values()):
                with pytest.raises(RuntimeError, match="load its checkpoint first"):
                    rows.peek(np.arange(2))
                number = choices.choice(sorted(expected))
                rows.load_state_dict(taken[number][0])
                now, known["loaded"] = taken[number][1], number
        elif action == "prefetch":
            rows.prefetch(np.arange(COUNT)[::-1])
        assert_holds(rows, now, "fetch" if action == "fetch" else "peek")
    for number, (state, was) in taken.items():
        if number in numbers(rows):
            rows.load_state_dict(state)
            assert_holds(rows, was)
        else:
            with pytest.raises(ValueError, match=f"keeps generations .* is of {number}"):
                rows.check(state, 10**9)
    assert rows.verify() == []
    rows.close()


def test_a_failed_load_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    with_rows = open_rows(tmp_path)
    commit(with_rows, 1)
    state = with_rows.state_dict()
    commit(with_rows, 2)
    (table,) = (tmp_path / "generations" / "1").glob("*.sst")
    table.rename(tmp_path / "table")
    for call in (lambda: with_rows.check(state, 9), lambda: with_rows.load_state_dict(state)):
        with pytest.raises(ValueError, match=rf"{table} is missing"):
            call()
    assert_holds(with_rows, after(after(initial(), 1), 2))
    (tmp_path / "table").rename(table)
    with_rows.load_state_dict(state)
    assert_holds(with_rows, after(initial(), 1))
    with_rows.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": True}, "generation must be an integer of at least 1, got True"),
        ({"generation": -1}, "got -1"),
        ({"generation": 1.0}, "got 1.0"),
        ({"generation": "1"}, "got '1'"),
        ({"generation": [1]}, r"got \[1\]"),
        ({"generation": 2}, r"keeps generations \[1\], and the checkpoint is of 2"),
        ({"generation": 2**70}, "keeps generations"),
        ({"rows": None}, "is of rows None"),
        ({"rows": "0" * 32}, "another folder's"),
        (None, "storage='device' or 'host'"),
    ],
)
@pytest.mark.parametrize("call", ["check", "load_state_dict", "confirm"])
def test_a_wrong_state_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, Any] | None, message: str, call: str
) -> None:
    rows = open_rows(tmp_path)
    commit(rows, 1)
    state = rows.state_dict()
    with pytest.raises(ValueError, match=message):
        getattr(rows, call)({} if change is None else state | change, *([9] if call == "check" else []))
    assert_holds(rows, after(initial(), 1))
    rows.close()


def test_rows_that_have_taken_more_steps_than_there_were_are_refused(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    for step in (5, 3):
        commit(rows, step)
    state = rows.state_dict()
    rows.check(state, 5)
    with pytest.raises(ValueError, match="rows as of step 5, and the checkpoint's history has 4 steps"):
        rows.check(state, 4)
    rows.load_state_dict(state)
    commit(rows, 4)
    with pytest.raises(ValueError, match="step 5"):
        rows.check(rows.state_dict(), 4)
    rows.close()


def test_what_was_announced_too_early_is_read_again(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    rows.prefetch(np.arange(COUNT))
    commit(rows, 1)
    assert_holds(rows, after(initial(), 1), "fetch")
    rows.close()


def test_a_folder_that_was_removed_and_made_again_does_not_take_old_checkpoints(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        rows = open_rows(tmp_path / "rows")
        commit(rows, 1)
        states.append(rows.state_dict())
        rows.close()
        shutil.rmtree(tmp_path / "rows") if len(states) == 1 else None
    rows = open_rows(tmp_path / "rows")
    assert states[0]["generation"] == states[1]["generation"]
    with pytest.raises(ValueError, match="another folder's"):
        rows.load_state_dict(states[0])
    rows.load_state_dict(states[1])
    rows.close()


# Which generations are kept, and who may start over


def test_a_training_that_was_never_known_to_be_saved_starts_over(tmp_path: Path) -> None:
    """The process may die between any state_dict() and its save, however often."""
    for attempt in range(5):
        rows = open_rows(tmp_path)
        if attempt:
            with pytest.warns(UserWarning, match="none of which was confirmed or loaded"):
                assert_holds(rows, initial())
        commit(rows, attempt + 1)
        assert rows.state_dict()["generation"] == attempt + 1
        assert numbers(rows) == [*range(max(1, attempt - 1), attempt + 2)]
        rows.close()


@pytest.mark.parametrize("how", ["confirmed", "loaded"])
def test_a_training_that_was_saved_wants_its_checkpoint(tmp_path: Path, how: str) -> None:
    rows = open_rows(tmp_path)
    commit(rows, 1)
    state = rows.state_dict()
    rows.confirm(state) if how == "confirmed" else rows.load_state_dict(state)
    rows.close()
    rows = open_rows(tmp_path)
    for call in (rows.peek, rows.fetch, rows.reserve):
        with pytest.raises(RuntimeError, match=r"load its checkpoint first.*another path.*remove the folder"):
            call(np.arange(2))
    rows.load_state_dict(state)
    assert_holds(rows, after(initial(), 1))
    rows.close()


def test_a_checkpoint_that_was_loaded_can_be_loaded_however_often_the_next_is_not_saved(
    tmp_path: Path,
) -> None:
    rows = open_rows(tmp_path)
    commit(rows, 1)
    state = rows.state_dict()
    rows.close()
    for step in range(2, 8):
        rows = open_rows(tmp_path)
        rows.load_state_dict(state)
        assert_holds(rows, after(initial(), 1))
        commit(rows, step)
        rows.state_dict()  # and then it dies
        rows.close()


def test_the_confirmed_checkpoint_stays_until_another_is_confirmed(tmp_path: Path) -> None:
    rows = open_rows(tmp_path, generations=1)
    states = []
    for step in range(1, 6):
        commit(rows, step)
        states.append(rows.state_dict())
        if step == 2:
            rows.confirm(states[-1])
    assert numbers(rows) == [2, 5]
    rows.confirm(states[-1])
    assert numbers(rows) == [5]
    rows.close()


# Damage


def flipped(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def two_generations(path: Path) -> list[tuple[Any, State]]:
    rows, now, taken = open_rows(path), initial(), []
    for step in (1, 2, 3, 4):
        commit(rows, step)
        now = after(now, step)
        if step % 2 == 0:
            taken.append((rows.state_dict(), now))
    rows.confirm(taken[0][0])
    rows.close()
    return taken


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    """By verify, always; and what is loaded all the same is right."""
    taken, random = two_generations(tmp_path / "rows"), np.random.default_rng(0)
    assert folder.verify(tmp_path / "rows") == []
    files = [file for file in (tmp_path / "rows").rglob("*") if file.is_file() and file.name != "lock"]
    assert {"rows.json", "kept.json", "files.json", "CURRENT"} <= {file.name for file in files}
    loads = 0
    for file in files:
        data = file.read_bytes()
        every = np.arange(len(data))
        for at in every if len(every) < 24 else np.sort(random.choice(every, 24, replace=False)):
            flipped(file, at, random.integers(8))
            found = folder.verify(tmp_path / "rows")
            assert any(str(file) in damage for damage in found), (file, at)
            if at % 5 == 0:
                loads += 1
                for state, was in taken:
                    try:
                        rows = open_rows(tmp_path / "rows")
                    except ValueError as error:
                        assert str(file) in str(error) or str(tmp_path / "rows") in str(error)  # noqa: PT017
                        continue
                    try:
                        rows.load_state_dict(state)
                        assert_holds(rows, was)
                    except (ValueError, OSError) as error:
                        assert str(tmp_path / "rows") in str(error)  # noqa: PT017
                    rows.close()
            file.write_bytes(data)
    assert loads > 20
    assert folder.verify(tmp_path / "rows") == []


def test_a_row_that_is_damaged_is_named_and_never_used(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    commit(rows, 1)
    state = rows.state_dict()
    rows.close()
    (table,) = (tmp_path / "generations" / "1").glob("*.sst")
    flipped(table, 100)
    rows = open_rows(tmp_path)
    rows.load_state_dict(state)  # tables are looked at when they are read
    with pytest.raises(OSError, match=r"damaged: .*checksum mismatch") as caught:
        rows.peek(np.arange(COUNT))
    assert str(caught.value.filename).startswith(str(tmp_path / "working"))
    assert any(str(table) in damage for damage in rows.verify())
    rows.close()


@pytest.mark.parametrize("damage", ["missing", "short", "long", "foreign"])
def test_files_that_are_not_as_they_were_are_found(tmp_path: Path, damage: str) -> None:
    (_, _), (state, was) = two_generations(tmp_path)
    generation = tmp_path / "generations" / "2"
    file = next(generation.glob("*.sst"))
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "foreign":
        file = generation / "000099.sst"
        file.write_bytes(data)
    else:
        file.unlink()
        file.write_bytes(data[:-1] if damage == "short" else data + b"x")
    assert any(str(file) in found for found in folder.verify(tmp_path))
    rows = open_rows(tmp_path)
    if damage == "foreign":  # it is none of those that are loaded
        rows.load_state_dict(state)
        assert_holds(rows, was)
    else:
        with pytest.raises(ValueError, match=str(file)):
            rows.check(state, 10**9)
    rows.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{}", b"\xff" * 99, b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**6, b" " * (20 << 20)],
)
@pytest.mark.parametrize("name", ["rows.json", "kept.json", "generations/2/files.json"])
def test_whatever_stands_in_a_file_of_ours_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    _, (state, _) = two_generations(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert any(str(tmp_path / name) in found for found in folder.verify(tmp_path))
    with pytest.raises(ValueError, match=rf"{tmp_path / name} is damaged"):
        open_rows(tmp_path).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rows.json", {"identity": 5}),
        ("rows.json", {"identity": "../" + "0" * 29}),
        ("kept.json", {"confirmed": -1}),
        ("kept.json", {"loaded": "2"}),
        ("kept.json", {"other": 1}),
        ("generations/2/files.json", {"generation": 1}),
        ("generations/2/files.json", {"identity": "0" * 32}),
        ("generations/2/files.json", {"files": []}),
        ("generations/2/files.json", {"files": {"../../rows.json": [1, 1]}}),
        ("generations/2/files.json", {"files": {"CURRENT": [1]}}),
        ("generations/2/files.json", {"files": {"CURRENT": [16, True]}}),
        ("generations/2/files.json", {"files": {}}),
    ],
)
def test_fields_are_checked_where_the_checksum_is_right(tmp_path: Path, name: str, changes: Any) -> None:
    _, (state, _) = two_generations(tmp_path)
    folder._write_json(str(tmp_path / name), folder._read_json(str(tmp_path / name)) | changes)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        open_rows(tmp_path).load_state_dict(state)


@pytest.mark.parametrize(
    "name",
    ["rows.json", "kept.json", "lock", "generations", "working", "generations/2", "generations/2/files.json"],
)
@pytest.mark.parametrize("dangling", [True, False])
def test_symbolic_links_are_refused_by_name(tmp_path: Path, name: str, dangling: bool) -> None:
    path = tmp_path / "rows"
    _, (state, _) = two_generations(path)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / ("nowhere" if dangling else "elsewhere"))
    before = {file: file.read_bytes() for file in (tmp_path / "elsewhere").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=rf"{path / name} must be a (file|folder), and is a symbolic link"):
        open_rows(path).load_state_dict(state)
    assert {
        file: file.read_bytes() for file in (tmp_path / "elsewhere").rglob("*") if file.is_file()
    } == before


def test_a_table_that_is_a_symbolic_link_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    _, (state, _) = two_generations(path)
    table = next((path / "generations" / "2").glob("*.sst"))
    table.rename(tmp_path / "elsewhere")
    table.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{table} must be a file, and is a symbolic link"):
        open_rows(path).load_state_dict(state)


# Other folders


@pytest.mark.parametrize(
    ("name", "value"), [("num_instances", 8), ("dim", 4), ("dtype", "float64"), ("seed", 6)]
)
def test_other_rows_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    asked = {"num_instances": COUNT, "dim": DIM, "dtype": "float32", "seed": SEED} | {name: value}
    open_rows(tmp_path).close()
    with pytest.raises(ValueError, match=rf"{tmp_path} holds .*{name}=.* but {name}={value!r} was asked"):
        disk.DiskStore(
            tmp_path, asked["num_instances"], asked["dim"], getattr(torch, asked["dtype"]), asked["seed"]
        )


@pytest.mark.parametrize(
    ("name", "value"), [("version", 3), ("format", "other"), ("version", "2"), ("seed", 5.0)]
)
def test_other_formats_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    open_rows(tmp_path).close()
    file = str(tmp_path / "rows.json")
    folder._write_json(file, folder._read_json(file) | {name: value})
    with pytest.raises(ValueError, match=f"rows.json is not of rows|holds rows with {name}={value!r}"):
        open_rows(tmp_path)


def test_the_former_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"format": "contrastive_ops.DiskStore", "version": 1}))
    (tmp_path / "rows.00000").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"format of an earlier version \(meta.json\)"):
        open_rows(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "rows.00000"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format": "contrastive_ops.rows"', "\xff"])
@pytest.mark.parametrize("name", ["rows.json", "thesis.tex", "generations", "kept.json"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(ValueError, match=name):
        open_rows(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text("latin-1") == content


def test_one_opener_at_a_time(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    for call in (open_rows, folder.verify):
        with pytest.raises(BlockingIOError, match="open elsewhere") as caught:
            call(tmp_path)
        assert caught.value.filename == str(tmp_path)
    rows.close()
    rows.close()
    for call in (rows.peek, rows.fetch, rows.reserve, rows.prefetch):
        with pytest.raises(ValueError, match="was closed"):
            call(np.arange(2))
    for call in (rows.state_dict, rows.verify):
        with pytest.raises(ValueError, match="was closed"):
            call()
    open_rows(tmp_path).close()


def test_without_rocksdict_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(ImportError, match=r"contrastive_ops\[disk\]"):
        open_rows(tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def test_a_billion_rows_take_the_space_of_those_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, started = resident(), time.perf_counter()
    rows = open_rows(tmp_path, 10**9, 128)
    assert time.perf_counter() - started < 1
    instances = np.random.default_rng(0).choice(10**9, 100, replace=False)
    records, steps = rows.peek(instances)
    np.testing.assert_allclose(records[:, 0].norm(dim=1), 1, rtol=1e-6)
    assert not records[:, 1].any()
    assert not steps.any()
    reserved, at = rows.reserve(instances)
    reserved[at] = records + 1
    rows.commit(instances, 2**40)
    rows.state_dict()
    found, steps = rows.peek(instances)
    np.testing.assert_array_equal(found, records + 1)
    assert (steps == 2**40).all()
    assert resident() - before < 64 << 20
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*")) * 512 < 1 << 20
    rows.close()


# Threads


def write_slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write = database.Database.write

    def slowly(database: Any, *arguments: Any) -> None:
        time.sleep(seconds)
        write(database, *arguments)

    monkeypatch.setattr(database.Database, "write", slowly)


def test_rows_are_served_from_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched while they are written behind, announced while others are kept."""
    write_slowly(monkeypatch, 0.003)
    rows, now, random = open_rows(tmp_path), initial(), np.random.default_rng(0)
    for step in range(1, 150):
        wanted = np.setdiff1d(random.choice(COUNT, 12, replace=False), batch(step)[0])
        rows.prefetch(wanted)
        commit(rows, step)
        now = after(now, step)
        order = random.permutation(wanted)
        (records, at), steps = rows.fetch(order[: len(order) - step % 3])
        np.testing.assert_array_equal(records[at].numpy(), now[0][order[: len(order) - step % 3]])
        np.testing.assert_array_equal(steps, now[1][order[: len(order) - step % 3]])
        if step % 40 == 0:
            rows.state_dict()
    assert_holds(rows, now)
    rows.close()


def test_neither_commit_nor_fetch_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slowly(monkeypatch, 1)
    rows, now = open_rows(tmp_path), initial()
    started = time.perf_counter()
    for step in range(1, 5):  # two tables: one is written, one fills
        commit(rows, step)
        now = after(now, step)
        assert_holds(rows, now)
    assert time.perf_counter() - started < 0.8
    rows.close()


# Errors of the disk, kills and power cuts, in processes of their own

SHAPE = (300, 4, 40)  # rows, dimension, rows kept in a step

DRIVER = """
import ctypes, os, random, sys
from pathlib import Path
import numpy as np
from tests.classifier.test_disk import *
database.TABLE_BYTES = 60 * (8 + 2 * SHAPE[1] * 4)
path = Path(sys.argv[1])
def mark(text):
    try: os.open("/mark/" + text, os.O_RDONLY)
    except OSError: pass
def state_of(history):
    state = initial(*SHAPE[:2])
    for step in history: state = after(state, step, *SHAPE)
    return state
"""

POWER = (
    DRIVER
    + """
random.seed(int(sys.argv[2]))
rows, history, taken, step = open_rows(path, *SHAPE[:2]), [], {}, 0
for round in range(12):
    for _ in range(random.randrange(1, 9)):
        step += 1
        commit(rows, step, *SHAPE)
        history.append(step)
    mark("taking " + " ".join(map(str, history)))
    state = rows.state_dict()
    mark(f"took {state['generation']} {state['rows']} " + " ".join(map(str, history)))
    taken[state["generation"]] = state, list(history)
    if random.random() < 0.4:
        mark(f"confirmed {state['generation']}")  # from now on the one before is not wanted any more
        rows.confirm(state)
    if random.random() < 0.3:
        if random.random() < 0.5:
            rows.close()
            rows = open_rows(path, *SHAPE[:2])
        state, history = random.choice([taken[number] for number in numbers(rows) if number in taken])
        history = list(history)
        rows.load_state_dict(state)
        mark(f"loaded {state['generation']}")
rows.close()
"""
)


def run(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    return power.compiled_shim(tmp_path_factory.mktemp("shim"))


def of_history(history: tuple[int, ...], memory: dict[tuple[int, ...], State]) -> State:
    if history not in memory:
        memory[history] = (
            after(of_history(history[:-1], memory), history[-1], *SHAPE) if history else initial(*SHAPE[:2])
        )
    return memory[history]


@pytest.mark.slow
def test_power_cuts(shim: Path, tmp_path: Path) -> None:
    """After any of them, every generation that was promised loads bit for bit; no other is ever wrong, and
    training goes on. DISK_POWER_CUTS says how many."""
    count = int(os.environ.get("DISK_POWER_CUTS", 40))
    tally = {"tried": 0, "right": 0, "refused": 0}
    for seed in range(max(1, count // 100)):
        root, log = tmp_path / f"rows{seed}", tmp_path / f"log{seed}"
        run(POWER, root, seed, LD_PRELOAD=str(shim), SHIM_ROOT=str(root), SHIM_LOG=str(log))
        cut(log, root, np.random.default_rng(seed), count // max(1, count // 100), tally)
    print(f"\npower cuts: {tally['tried']} generations tried, {tally}")
    assert tally["right"] > count


def cut(log: Path, root: Path, random: np.random.Generator, count: int, tally: dict[str, int]) -> None:
    records = list(power.read_log(log))
    cuts = np.sort(random.choice(len(records), count, replace=False))
    device, memory = power.Disk(root), dict[tuple[int, ...], State]()
    histories: dict[int, tuple[int, ...]] = {}
    promised: dict[str, int | None] = {"confirmed": None, "loaded": None}
    identity, taking, under_way = None, (), False
    for at, record in enumerate(records):
        for _ in range(np.count_nonzero(cuts == at)):
            there = root.with_name("crashed")
            device.crash(there, random)
            rows = open_rows(there, *SHAPE[:2])
            # The one that is being taken counts among the last three.
            must = {*sorted(histories)[-2 if under_way else -3 :], *(n for n in promised.values() if n)}
            for number in {*numbers(rows), *must}:
                tally["tried"] += 1
                state = {"generation": number, "rows": identity or rows._folder.identity}
                try:
                    rows.load_state_dict(state)
                    right = holds(rows, of_history(histories.get(number, taking), memory))
                    assert right, f"generation {number} is wrong after cut {at}"
                    tally["right"] += 1
                except (ValueError, OSError):
                    assert number not in must, f"generation {number} does not load after cut {at}"
                    tally["refused"] += 1
            step = 10**6 + at
            if not rows._barred:
                before = rows.peek(np.arange(SHAPE[0]))
                commit(rows, step, *SHAPE)
                expected = after((before[0].numpy(), before[1]), step, *SHAPE)
                state = rows.state_dict()
                commit(rows, step + 1, *SHAPE)
                rows.load_state_dict(state)
                assert holds(rows, expected)
            rows.close()
            shutil.rmtree(there)
        if record.change == power.Change.MARKED:
            what, *words = record.first.decode().split()
            under_way = what == "taking"
            if what == "taking":
                taking = tuple(map(int, words))
            elif what == "took":
                identity = words[1]
                histories[int(words[0])] = tuple(map(int, words[2:]))
            elif what == "confirmed":
                promised = {"confirmed": int(words[0]), "loaded": None}
            elif what == "loaded":
                promised["loaded"] = int(words[0])
        else:
            device.apply(record)


@pytest.mark.slow
def test_the_log_of_the_shim_is_the_whole_truth(shim: Path, tmp_path: Path) -> None:
    """What it says was done makes the folder that is there."""
    root, log = tmp_path / "rows", tmp_path / "log"
    run(POWER, root, 1, LD_PRELOAD=str(shim), SHIM_ROOT=str(root), SHIM_LOG=str(log))
    device = power.Disk(root)
    for record in power.read_log(log):
        if record.change != power.Change.MARKED:
            device.apply(record)

    def compare(folder: power.Folder, path: Path) -> None:
        assert set(folder.now) == {entry.name for entry in path.iterdir()}
        for name, entry in folder.now.items():
            if isinstance(entry, power.Folder):
                compare(entry, path / name)
            else:
                assert bytes(entry.crashed(None)) == (path / name).read_bytes(), path / name

    compare(device.tree, root)


FAULTS = (
    DRIVER
    + """
import errno
fault = ctypes.CDLL(None).shim_fault
fault.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long]
errors = 0
for after_calls in range(int(sys.argv[2]), 400, int(sys.argv[3])):
    number = (errno.ENOSPC, errno.EIO)[after_calls % 2]
    place = path / str(after_calls)
    fault(0, -1, 0)
    rows, history, step = open_rows(place, *SHAPE[:2]), [], 0
    commit(rows, 1, *SHAPE); history.append(1)
    state, was = rows.state_dict(), [1]
    fault(number, after_calls, (1, 3, 10**9)[after_calls % 3])
    failed = 0
    for step in range(2, 40):
        for attempt in range(100):
            try:
                if attempt == 0 or pending == "commit":
                    pending = "commit"
                    commit(rows, step, *SHAPE)
                    history.append(step)
                pending = "state"
                if step % 5 == 0:
                    state, was = rows.state_dict(), list(history)
                if step % 12 == 0:
                    pending = "load"
                    rows.load_state_dict(state)
                    history = list(was)
                break
            except OSError as error:
                failed += 1
                assert error.errno == number, error
                assert str(error.filename).startswith(str(place)), error
                if pending != "load":
                    assert holds(rows, state_of(history))  # also while the disk is full
                if attempt == 2:
                    fault(0, -1, 0)
        else:
            raise AssertionError("it fails for ever")
    fault(0, -1, 0)
    errors += failed > 0
    assert holds(rows, state_of(history))
    state = rows.state_dict()
    rows.close()
    rows = open_rows(place, *SHAPE[:2])
    rows.load_state_dict(state)
    assert holds(rows, state_of(history))
    assert rows.verify() == []
    rows.close()
print(errors)
"""
)


@pytest.mark.slow
def test_a_disk_that_is_full_or_broken_loses_nothing(shim: Path, tmp_path: Path) -> None:
    """Wherever it fails, once or for long: the error names file and cause, no row is lost, and it goes on."""
    start, stride = (0, 21) if "DISK_FAULTS" not in os.environ else (0, int(os.environ["DISK_FAULTS"]))
    done = run(FAULTS, tmp_path, start, stride, LD_PRELOAD=str(shim), SHIM_ROOT=str(tmp_path))
    print(f"\n{done.stdout.strip()} runs met an error")
    assert int(done.stdout) > 400 / stride / 2


LIMIT = (
    DRIVER
    + """
import errno, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows, history = open_rows(path, *SHAPE[:2]), []
for step in range(1, 6):
    commit(rows, step, *SHAPE); history.append(step)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
for _ in range(3):
    try: rows.state_dict()
    except OSError as error:
        assert error.errno == errno.EFBIG, error
        assert str(path) in str(error.filename)
    else: raise AssertionError
    assert holds(rows, state_of(history))
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
state = rows.state_dict()
commit(rows, 6, *SHAPE)
rows.load_state_dict(state)
assert holds(rows, state_of(history))
rows.close()
"""
)


@pytest.mark.slow
def test_files_over_a_size_limit(tmp_path: Path) -> None:
    run(LIMIT, tmp_path / "rows")


FORK = (
    DRIVER
    + """
rows = open_rows(path, *SHAPE[:2])
for step in range(1, 9): commit(rows, step, *SHAPE)
state = rows.state_dict()
rows.prefetch(np.arange(20))
child = os.fork()
if child == 0:
    for call in (rows.peek, rows.fetch, rows.reserve, rows.prefetch):
        try: call(np.arange(2))
        except RuntimeError as error: assert "is a fork" in str(error) and str(path) in str(error)
        else: os._exit(3)
    for call in (rows.state_dict, rows.verify, lambda: rows.confirm(state), lambda: rows.check(state, 9),
                 lambda: rows.load_state_dict(state), lambda: rows.commit(np.arange(2), 1)):
        try: call()
        except RuntimeError as error: assert "is a fork" in str(error)
        else: os._exit(4)
    try: open_rows(path.with_name("other"), *SHAPE[:2])
    except RuntimeError as error: assert "fork" in str(error)
    else: os._exit(5)
    rows.close()
    del rows
    import gc; gc.collect()
    sys.exit(7)
code = os.waitpid(child, 0)[1]
assert code == 7 << 8, code
commit(rows, 9, *SHAPE)
assert holds(rows, state_of(range(1, 10)))
rows.load_state_dict(state)
assert holds(rows, state_of(range(1, 9)))
child = os.fork()
if child == 0:
    os.close(1), os.close(2), time.sleep(60), os._exit(0)
print(child, flush=True)
os._exit(0)  # dies without closing; the child lives on
"""
)


@pytest.mark.slow
def test_a_forked_process_refuses_and_is_dropped_quietly(tmp_path: Path) -> None:
    """Nor does it hold the lock when its parent is gone."""
    done = run(FORK, tmp_path / "rows")
    assert not done.stderr
    try:
        open_rows(tmp_path / "rows", *SHAPE[:2]).close()
    finally:
        os.kill(int(done.stdout), 9)


def train(path: Path) -> None:
    """Go on from the newest checkpoint that was saved; there is one every five steps."""
    database.TABLE_BYTES = 400 * (8 + 2 * 16 * 4)
    rows, file = open_rows(path / "rows", *KILLED[:2]), path / "checkpoint.json"
    done = 0
    if file.exists():
        saved = json.loads(file.read_text())
        rows.load_state_dict(saved["state"])
        done = saved["step"]
    for step in range(done + 1, 10**6):
        commit(rows, step, *KILLED)
        if step % 5 == 0:
            (path / "new").write_text(json.dumps({"state": rows.state_dict(), "step": step}))
            os.replace(path / "new", file)
            if step % 15 == 0:
                rows.confirm(json.loads(file.read_text())["state"])


KILLED = (3000, 16, 300)


@pytest.mark.slow
def test_kill_9_while_training(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.classifier.test_disk"])
    states, random = [initial(*KILLED[:2])], np.random.default_rng(0)
    kills = 0
    while kills < 12 or len(states) <= 20:  # on a busy machine many come before the first steps
        kills += 1
        assert kills < 200
        process = context.Process(target=train, args=(tmp_path,))
        process.start()
        process.join(random.uniform(0.1, 0.8))
        assert process.is_alive()
        process.kill()
        process.join()
        rows = open_rows(tmp_path / "rows", *KILLED[:2])
        if (tmp_path / "checkpoint.json").exists():
            saved = json.loads((tmp_path / "checkpoint.json").read_text())
            rows.load_state_dict(saved["state"])
            while len(states) <= saved["step"]:
                states.append(after(states[-1], len(states), *KILLED))
            assert_holds(rows, states[saved["step"]])
        else:
            assert holds(rows, states[0])
        rows.close()
