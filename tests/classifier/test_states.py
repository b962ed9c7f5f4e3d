"""A classifier's state is one moment, and is loaded as a whole or not at all."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss

COUNT, DIM, ACTIVE, BATCH = 60, 4, 12, 4
EVERY = torch.arange(COUNT)


def make(storage: str = "device", path: Path | None = None, **arguments: Any) -> InstanceClassifier:
    settings: dict[str, Any] = {"num_instances": COUNT, "dim": DIM, "active": ACTIVE, "seed": 4} | arguments
    return InstanceClassifier(**settings, storage=storage, path=path)  # type: ignore[arg-type]


def train(of: InstanceClassifier, optimizer: DelayedSGD, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        target = of.activate(torch.randint(COUNT, (BATCH,), generator=generator))
        views = torch.randn(2, BATCH, DIM, generator=generator)
        conic_loss(views, of.weight, target, num_instances=COUNT).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=["device", "host", "disk"])
def trained(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[InstanceClassifier, DelayedSGD]]:
    of = make(request.param, tmp_path / "rows" if request.param == "disk" else None)
    optimizer = DelayedSGD(of, lr=0.3)
    train(of, optimizer, 0, 20)
    yield of, optimizer
    of.close()


def leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from leaves(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from leaves(value)
    else:
        yield state


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(leaves(one), leaves(other), strict=True)
    )


class TestOneMoment:
    def test_training_leaves_a_state_alone(self, trained: tuple[InstanceClassifier, DelayedSGD]) -> None:
        """Also where the classifier is a part of a model."""
        of, optimizer = trained
        state = nn.ModuleDict({"head": of}).state_dict(), optimizer.state_dict()
        expected = copy.deepcopy(state)
        train(of, optimizer, 20, 40)
        assert same(state, expected)

    def test_a_state_that_is_held_is_the_moment_it_was_taken(
        self, trained: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        of, optimizer = trained
        state, rows = of.state_dict(), of.read(EVERY)
        train(of, optimizer, 20, 40)
        of.load_state_dict(state)
        assert all(map(torch.equal, of.read(EVERY), rows))

    def test_saved_by_a_thread_while_training_goes_on(
        self, trained: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        """As asynchronous savers do, which are given the state and take their time."""
        of, optimizer = trained
        rows, buffer, go = of.read(EVERY), io.BytesIO(), threading.Event()
        state = of.state_dict()
        thread = threading.Thread(target=lambda: (go.wait(), torch.save(state, buffer)))
        thread.start()
        train(of, optimizer, 20, 30)
        go.set()
        train(of, optimizer, 30, 40)
        thread.join()
        buffer.seek(0)
        of.load_state_dict(torch.load(buffer, weights_only=True))
        assert all(map(torch.equal, of.read(EVERY), rows))

    def test_a_learning_rate_that_is_a_tensor(self) -> None:
        optimizer = DelayedSGD(make(), lr=torch.tensor(0.25))  # type: ignore[arg-type]
        state = optimizer.state_dict()
        optimizer.param_groups[0]["lr"].fill_(7.0)
        assert state["param_groups"][0]["lr"] == 0.25

    def test_rows_never_kept_take_no_space(self) -> None:
        of = make(num_instances=10**7, dim=64)
        optimizer = DelayedSGD(of, lr=0.1)
        of.activate(torch.tensor([9_999_999, 12]))
        of.weight.grad = torch.ones_like(of.weight)
        optimizer.step()
        of.activate(torch.tensor([5_000_000, 13]))
        records = of.state_dict()["_extra_state"]["storage"][0]["records"]
        assert len(records) <= 8  # four have come, four have gone
        other = make(num_instances=10**7, dim=64)
        other.activate(torch.arange(100, 100 + ACTIVE))  # and rows of its own, which are forgotten
        other.load_state_dict(of.state_dict())
        some = torch.tensor([9_999_999, 12, 13, 5_000_000, 100, 101, 7_654_321])
        assert all(map(torch.equal, other.read(some), of.read(some)))

    def test_loading_forgets_what_was_not_in_the_state(
        self, trained: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        """Rows that were first kept after the state was taken are their initial values again."""
        of, optimizer = trained
        fresh = make()
        if "generation" in of.state_dict()["_extra_state"]["storage"][0]:
            pytest.skip("files go back to their own past only")
        of.load_state_dict(fresh.state_dict())
        assert all(map(torch.equal, of.read(EVERY), fresh.read(EVERY)))
        train(of, optimizer, 0, 10)
        train(fresh, DelayedSGD(fresh, lr=0.3), 0, 10)
        assert all(map(torch.equal, of.read(EVERY), fresh.read(EVERY)))

    def test_assign_copies_into_the_tensors_that_the_optimizer_holds(
        self, trained: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        of, optimizer = trained
        weight, state, rows = of.weight, of.state_dict(), of.read(EVERY)
        train(of, optimizer, 20, 25)
        of.load_state_dict(state, assign=True)
        assert of.weight is weight
        assert optimizer.param_groups[0]["params"] == [of.weight]
        assert all(map(torch.equal, of.read(EVERY), rows))
        train(of, optimizer, 20, 25)
        after = of.read(EVERY)
        of.load_state_dict(state)
        train(of, optimizer, 20, 25)
        assert all(map(torch.equal, of.read(EVERY), after))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_shallow_copy_shares_no_rows(gradient: bool) -> None:
    of = make()
    optimizer = DelayedSGD(of, lr=0.3)
    train(of, optimizer, 0, 5)
    if gradient:
        for indices in (EVERY[:4], EVERY[20:24]):
            target = of.activate(indices)
            conic_loss(torch.randn(2, 4, DIM), of.weight, target).backward()
        assert of.carried is not None
    rows, carried = of.read(EVERY), of.carried
    other = copy.copy(of)
    assert all(map(torch.equal, other.read(EVERY), rows))
    other.activate(EVERY[30:34])
    assert of.carried is carried
    assert all(map(torch.equal, of.read(EVERY), rows))


def test_reading_the_states_of_a_model_takes_no_step() -> None:
    """torch.distributed.checkpoint takes one, where an optimiser's state is empty."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def model() -> tuple[nn.ModuleDict, DelayedSGD]:
        of = make()
        return nn.ModuleDict({"head": of}), DelayedSGD(of, lr=0.3)

    trained, optimizer = model()
    train(trained["head"], optimizer, 0, 10)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})  # as it was saved
    rows = trained["head"].read(EVERY)
    states = get_state_dict(trained, optimizer)
    assert len(trained["head"].history) == 10
    assert all(map(torch.equal, trained["head"].read(EVERY), rows))
    other, its_optimizer = model()
    its_optimizer.param_groups[0]["lr"] = 0.7
    set_state_dict(other, its_optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    assert its_optimizer.param_groups[0]["lr"] == 0.3
    for of, its in ((trained["head"], optimizer), (other["head"], its_optimizer)):
        train(of, its, 10, 15)
    assert all(map(torch.equal, other["head"].read(EVERY), trained["head"].read(EVERY)))


def test_an_optimizer_holds_the_weight_that_a_move_has_put_in_place() -> None:
    of = make()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        of._apply(lambda t: t.clone())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    optimizer = DelayedSGD(of, lr=0.3)
    assert optimizer.param_groups[0]["params"][0] is of.weight


def change(path: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        *folders, name = path.split("/")
        for folder in folders:
            state = state[folder]
            state = state[0] if isinstance(state, tuple) else state
        state[name] = value(state[name])

    return apply


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        *folders, name = path.split("/")
        for folder in folders:
            state = state[folder]
            state = state[0] if isinstance(state, tuple) else state
        del state[name]

    return apply


def with_nan(value: Tensor) -> Tensor:
    value = value.contiguous().clone()
    value.view(-1)[0] = float("nan")
    return value


def huge(*shape: int) -> Callable[[Tensor], Tensor]:
    """Expanded from one number: a copy would take hundreds of gigabytes."""
    return lambda value: torch.zeros((), dtype=value.dtype).expand(shape)


HISTORY, ACTIVE_SET, STORAGE = "_extra_state/history/", "_extra_state/active/", "_extra_state/storage/"
FLOATS = ("table", "remaining")
DAMAGED = {
    "weight of other rows": change("weight", lambda w: w[:-1]),
    "weight of another dtype": change("weight", lambda w: w.double()),
    "weight is no tensor": change("weight", lambda w: w.tolist()),
    "weight on meta": change("weight", lambda w: w.to("meta")),
    "momentum missing": without("momentum"),
    "weight missing": without("weight"),
    "extra state missing": without("_extra_state"),
    "extra state is a list": change("_extra_state", lambda e: [1]),
    "other number of instances": change("_extra_state/num_instances", lambda n: n + 1),
    "other seed": change("_extra_state/seed", lambda n: n + 1),
    "no seed": without("_extra_state/seed"),
    "no history": without("_extra_state/history"),
    "no active set": without("_extra_state/active"),
    "no storage": without("_extra_state/storage"),
    **{
        f"history without {name}": without(HISTORY + name)
        for name in (*FLOATS, "current", "segments", "between")
    },
    **{f"NaN in the history's {name}": change(HISTORY + name, with_nan) for name in FLOATS},
    "empty table": change(HISTORY + "table", lambda t: t[:, :0]),
    "truncated table": change(HISTORY + "table", lambda t: t[:3]),
    "table of fewer steps than the window": change(HISTORY + "table", lambda t: t[:, :1]),
    "table of 298 GiB": change(HISTORY + "table", huge(4, 10**10)),
    "table in float32": change(HISTORY + "table", lambda t: t.float()),
    "table is a list": change(HISTORY + "table", lambda t: t.tolist()),
    "sparse table": change(HISTORY + "table", lambda t: t.to_sparse()),
    "empty window": change(HISTORY + "remaining", lambda t: t[:0]),
    "window of 74 GiB": change(HISTORY + "remaining", huge(10**10)),
    "segment that begins after the end": change(HISTORY + "current", lambda t: torch.tensor([10**6, 0])),
    "negative segment": change(HISTORY + "current", lambda t: torch.tensor([-1, 0])),
    "segments of none": change(HISTORY + "segments", lambda t: torch.zeros(2, 5, dtype=torch.float64)),
    "instance twice": change(ACTIVE_SET + "instances", lambda t: t.clone().fill_(3)),
    "instance beyond N": change(ACTIVE_SET + "instances", lambda t: t + COUNT),
    "slot twice": change(ACTIVE_SET + "order", lambda t: t.clone().fill_(0)),
    "order of another size": change(ACTIVE_SET + "order", lambda t: t[:-1]),
    "order in int32": change(ACTIVE_SET + "order", lambda t: t.int()),
    "more protected than active": change(ACTIVE_SET + "protected", lambda t: t + 1000),
    "no protected": without(ACTIVE_SET + "protected"),
}
DAMAGED_ROWS = {
    "rows missing": without(STORAGE + "records"),
    "rows of another dim": change(STORAGE + "records", lambda t: t[..., :-1]),
    "fewer rows than instances": change(STORAGE + "records", lambda t: t[:-1]),
    "rows of 298 GiB": change(STORAGE + "records", lambda t: t[:1, :, :].expand(10**10, 2, DIM)),
    "row beyond N": change(STORAGE + "instances", lambda t: t + COUNT),
    "negative row": change(STORAGE + "instances", lambda t: t - COUNT),
    "row twice": change(STORAGE + "instances", lambda t: torch.full_like(t, 5)),
    "steps that never were": change(STORAGE + "steps", lambda t: t + 1000),
    "steps before the first": change(STORAGE + "steps", lambda t: t - 1000),
    "rows are a list": change(STORAGE + "records", lambda t: t.tolist()),
    "storage is a list": change("_extra_state/storage", lambda t: [1, 2]),
    "of a disk": change("_extra_state/storage", lambda t: {"generation": 3}),
}
DAMAGED_DISK = {
    "of memory": change(
        "_extra_state/storage", lambda t: {"records": torch.zeros(0), "steps": torch.zeros(0)}
    ),
    "a generation that never was": change(STORAGE + "generation", lambda g: g + 7),
    "generation of another type": change(STORAGE + "generation", lambda g: "x"),
    "storage is a list": change("_extra_state/storage", lambda t: [1, 2]),
}


class TestAllOrNothing:
    @pytest.mark.parametrize("what", [*DAMAGED, *DAMAGED_ROWS, *DAMAGED_DISK])
    def test_what_is_damaged_changes_nothing(
        self, what: str, trained: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        of, optimizer = trained
        state = copy.deepcopy(of.state_dict())
        own = DAMAGED_DISK if "generation" in state["_extra_state"]["storage"][0] else DAMAGED_ROWS
        if what not in DAMAGED and what not in own:
            pytest.skip("of another storage")
        train(of, optimizer, 20, 30)
        (DAMAGED | own)[what](state)
        rows, active, steps = of.read(EVERY), of.active_instances, len(of.history)
        of.weight.grad = torch.ones_like(of.weight)
        with pytest.raises(ValueError, match=r"checkpoint|distinct|order|protected|state's"):
            of.load_state_dict(state)
        assert of.weight.grad is not None
        optimizer.zero_grad()
        assert all(map(torch.equal, of.read(EVERY), rows))
        assert torch.equal(of.active_instances, active)
        assert len(of.history) == steps
        train(of, optimizer, 30, 33)

    def test_other_names_are_reported(self) -> None:
        of = make()
        state = of.state_dict() | {"stranger": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger"):
            of.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
            of.load_state_dict({})

    def test_a_training_that_diverged_can_be_loaded(self) -> None:
        of = make()
        with torch.no_grad():
            of.weight[0] = float("nan")
        other = make()
        other.load_state_dict(of.state_dict())
        assert other.weight[0].isnan().all()


class TestWrite:
    @pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float64])
    def test_is_what_read_says(
        self, trained: tuple[InstanceClassifier, DelayedSGD], rows_dtype: torch.dtype
    ) -> None:
        of, _ = trained
        weight, momentum = torch.randn(2, COUNT, DIM).to(rows_dtype)
        before = of.active_instances
        order = torch.randperm(COUNT)
        for rows in order.split(7):
            of.write(rows, weight[rows], momentum[rows])
        assert all(map(torch.equal, of.read(EVERY), (weight.float(), momentum.float())))
        assert torch.equal(of.active_instances, before)
        of.write(EVERY[:3], weight[:3])
        assert not of.read(EVERY[:3])[1].any()

    def test_a_dense_classifier_trains_on(self, trained: tuple[InstanceClassifier, DelayedSGD]) -> None:
        """Rows that were written are caught up from then on."""
        of, optimizer = trained
        dense = nn.Parameter(torch.randn(COUNT, DIM))
        exact = torch.optim.SGD([dense], lr=0.3, momentum=0.9, weight_decay=1e-4)
        of.write(EVERY, dense.detach())
        for _ in range(5):
            of.weight.grad = torch.zeros_like(of.weight)
            dense.grad = torch.zeros_like(dense)
            optimizer.step()
            exact.step()
        torch.testing.assert_close(of.read(EVERY)[0], dense.detach())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.tensor([0, 0]), torch.zeros(2, DIM)), "indices must be distinct"),
            ((torch.tensor([0, COUNT]), torch.zeros(2, DIM)), "indices must be in"),
            ((torch.tensor([0, 1]), torch.zeros(3, DIM)), r"weight must be \(2, 4\)"),
            ((torch.tensor([0, 1]), torch.zeros(2, DIM, device="meta")), "weight must be .* have values"),
            ((torch.tensor([0, 1]), torch.zeros(2, DIM), torch.zeros(2, 1)), r"momentum must be \(2, 4\)"),
            ((torch.tensor([0, 1]), torch.zeros(2, DIM).int()), "weight must be a floating-point"),
            ((torch.tensor([0, 1]), [1.0]), "weight must be a floating-point torch.Tensor, got list"),
        ],
    )
    def test_refuses_what_is_wrong(self, arguments: tuple[Any, ...], message: str) -> None:
        of = make()
        before = of.read(EVERY)
        with pytest.raises((TypeError, ValueError), match=message):
            of.write(*arguments)
        assert all(map(torch.equal, of.read(EVERY), before))
