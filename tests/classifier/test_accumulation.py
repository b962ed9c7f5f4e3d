"""Gradients accumulated over several batches, each with an active set of its own, against dense SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss

COUNT, DIM, ACTIVE, BATCH = 40, 5, 12, 3
SETTINGS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}


class Both:
    """A classifier with an active set, and all of its rows under torch.optim.SGD, on the same losses."""

    def __init__(self, seed: int = 0, storage: str = "device", path: Path | None = None, **settings: Any):
        settings = SETTINGS | settings
        of = {"dim": DIM, "active": ACTIVE, "seed": 2, "dtype": torch.float64}
        self.classifier = InstanceClassifier(COUNT, storage=storage, path=path, **of)  # type: ignore[arg-type]
        self.optimizer = DelayedSGD(self.classifier, **settings)
        self.dense = nn.Parameter(self.classifier.read(torch.arange(COUNT))[0].clone())
        self.dense_optimizer = torch.optim.SGD([self.dense], **settings)
        self.generator = torch.Generator().manual_seed(seed)

    def losses(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The losses of the active rows, by ours and by the dense one, which sees which these are."""
        if indices is None:
            indices = torch.randint(COUNT, (BATCH,), generator=self.generator)
        views = torch.randn(2, len(indices), DIM, generator=self.generator, dtype=torch.float64)
        target = self.classifier.activate(indices)
        active = self.classifier.active_instances
        return (
            conic_loss(views, self.classifier.weight, target, num_instances=COUNT),
            conic_loss(views, self.dense[active], target, num_instances=COUNT),
        )

    def backward(self, indices: Tensor | None = None) -> None:
        for loss in self.losses(indices):
            loss.backward()

    def step(self) -> None:
        for optimizer in (self.optimizer, self.dense_optimizer):
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in (self.optimizer, self.dense_optimizer):
            optimizer.zero_grad(set_to_none)

    def assert_equal(self) -> None:
        weight, momentum = self.classifier.read(torch.arange(COUNT))
        expected = self.dense_optimizer.state[self.dense].get("momentum_buffer", torch.zeros_like(self.dense))
        for ours, dense in ((weight, self.dense.detach()), (momentum, expected)):
            assert (ours - dense).norm() <= 1e-10 * max(1.0, dense.norm().item())


@pytest.fixture(params=["device", "host", "disk"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    storage = request.param
    made = Both(storage=storage, path=tmp_path / "rows" if storage == "disk" else None)
    yield made
    made.classifier.close()


def test_equals_dense_sgd_on_the_sum_of_the_losses(both: Both) -> None:
    for _ in range(8):
        for _ in range(4):
            both.backward()
        assert both.classifier.carried is not None  # or nothing would be tested
        both.step()
        both.zero_grad()
        assert both.classifier.carried is None
        both.assert_equal()


@given(
    batches=st.lists(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=3), min_size=1, max_size=12),
    steps=st.sets(st.integers(0, 11)),
    clear=st.sampled_from([True, False]),
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
    lr=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_whatever_comes_and_goes(
    batches: list[list[int]], steps: set[int], clear: bool, momentum: float, nesterov: bool, lr: float
) -> None:
    """Rows evicted between a backward and the step, and active again before it or after."""
    both = Both(lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    for number, batch in enumerate(batches):
        both.backward(torch.tensor(batch))
        if number in steps or both.classifier._active.state()["protected"][0] > ACTIVE - 3:
            both.step()
            both.zero_grad(set_to_none=clear)
    both.step()
    weight = both.classifier.read(torch.arange(COUNT))[0]
    assert (weight - both.dense.detach()).norm() <= 1e-10 * both.dense.norm()


def test_evicted_rows_that_come_back_have_their_gradient() -> None:
    both = Both()
    both.backward(torch.arange(3))
    absent = [i for i in range(COUNT) if i not in both.classifier.active_instances]
    gone = both.classifier.active_instances.clone()
    both.backward(torch.tensor(absent[:3]))
    evicted = [i for i in gone.tolist() if i not in both.classifier.active_instances]
    assert len(evicted) == 3
    both.backward(torch.tensor(evicted))
    slots = [both.classifier.active_instances.tolist().index(i) for i in evicted]
    assert both.classifier.weight.grad is not None
    assert both.dense.grad is not None
    torch.testing.assert_close(both.classifier.weight.grad[slots], both.dense.grad[evicted])
    both.step()
    both.assert_equal()


def clip_norm(parameters: Any) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.01)


def clip_value(parameters: Any) -> None:
    torch.nn.utils.clip_grad_value_(parameters, 1e-3)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
@pytest.mark.parametrize("by", ["module", "optimizer"])
def test_clipping_sees_all_rows(clip: Callable[[Any], None], by: str) -> None:
    both = Both()
    for _ in range(4):
        both.backward()
        both.backward()
        assert both.classifier.carried is not None
        groups = both.optimizer.param_groups
        clip(both.classifier.parameters() if by == "module" else groups[0]["params"])
        clip([both.dense])
        both.step()
        both.zero_grad()
        both.assert_equal()


def test_a_loss_scaler_sees_all_rows() -> None:
    """It divides by its scale, and skips a step for the sake of a row that has been evicted."""
    both = Both()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    optimizers = (both.optimizer, both.dense_optimizer)
    for number in range(6):
        for _ in range(3):
            for scaler, loss in zip(scalers, both.losses(), strict=True):
                scaler.scale(loss).backward()
        if number == 3:
            assert both.classifier.carried is not None
            assert both.classifier.carried.grad is not None
            both.classifier.carried.grad[0, 0] = float("inf")
            assert both.dense.grad is not None
            both.dense.grad[0, 0] = float("inf")
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        both.zero_grad()
        both.assert_equal()
    assert len(both.classifier.history) == 5
    assert scalers[0].get_scale() == scalers[1].get_scale()


def drop_by_optimizer(both: Both) -> None:
    both.zero_grad()


def drop_to_zero(both: Both) -> None:
    both.zero_grad(set_to_none=False)


def drop_by_module(both: Both) -> None:
    both.classifier.zero_grad()
    both.dense.grad = None


def drop_by_hand(both: Both) -> None:
    both.classifier.weight.grad = both.dense.grad = None


@pytest.mark.parametrize("drop", [drop_by_optimizer, drop_to_zero, drop_by_module, drop_by_hand])
@pytest.mark.parametrize("stepped", [False, True])
def test_what_is_thrown_away_does_not_come_back(drop: Callable[[Both], None], stepped: bool) -> None:
    """Whether or not it was spent, whoever threw it away, and whichever call comes next."""
    both = Both()
    for _ in range(3):
        both.backward()
        both.backward()
        if stepped:
            both.step()
        drop(both)
        both.backward()
        both.backward()
        drop(both)
        if stepped:
            loss, dense = both.losses()
            both.zero_grad()
            loss.backward()
            dense.backward()
            both.step()
            drop(both)
        both.step()
        both.assert_equal()


def test_thrown_away_between_activation_and_backward() -> None:
    """By hand, which nobody is told of."""
    both = Both()
    both.backward()
    loss, dense = both.losses()
    assert both.classifier.carried is not None
    both.classifier.weight.grad = both.dense.grad = None
    loss.backward()
    dense.backward()
    both.step()
    both.assert_equal()


def test_replaced_by_a_sum() -> None:
    """As those do who accumulate by hand."""
    both = Both()
    for _ in range(3):
        for first in (True, False):
            (grad,) = torch.autograd.grad(both.losses()[0], [both.classifier.weight])
            dense = torch.zeros_like(both.dense).index_copy(0, both.classifier.active_instances, grad)
            if first:
                both.classifier.weight.grad, both.dense.grad = grad, dense
            else:
                assert both.classifier.weight.grad is not None
                assert both.dense.grad is not None
                both.classifier.weight.grad = both.classifier.weight.grad + grad
                both.dense.grad = both.dense.grad + dense
        both.step()
        both.zero_grad()
        both.assert_equal()


@pytest.mark.parametrize("drop", [False, True])
def test_a_spent_gradient_replaced_by_hand(drop: bool) -> None:
    """By those who set gradients themselves, and never throw one away."""
    both = Both()
    for _ in range(6):
        both.losses()
        active = both.classifier.active_instances
        grad = torch.randn(ACTIVE, DIM, generator=both.generator, dtype=torch.float64)
        both.classifier.weight.grad = grad
        both.dense.grad = torch.zeros_like(both.dense).index_copy(0, active, grad)
        both.step()
        if drop:
            both.classifier.weight.grad = None
        both.assert_equal()


def test_a_second_step_on_the_same_gradient() -> None:
    both = Both()
    both.backward()
    both.step()
    both.backward()  # beside the spent one, as in PyTorch
    both.step()
    both.step()
    both.assert_equal()


def test_a_step_that_backward_has_taken_is_recorded_before_rows_are_exchanged() -> None:
    """Or read, or saved; the step that closes it may come late."""
    for look in ("activate", "read", "state_dict", "write", "step"):
        both = Both()
        for _ in range(4):
            indices = torch.randint(COUNT, (BATCH,), generator=both.generator)
            views = torch.randn(2, BATCH, DIM, generator=both.generator, dtype=torch.float64)
            target = both.classifier.activate(indices)
            dense = both.dense[both.classifier.active_instances]
            conic_loss(views, dense, target, num_instances=COUNT).backward()
            update = both.optimizer.in_backward()
            loss = conic_loss(views, both.classifier.weight, target, num_instances=COUNT, update=update)
            loss.backward()
            both.dense_optimizer.step()
            if look == "activate":
                both.classifier.activate(torch.randint(COUNT, (BATCH,), generator=both.generator))
            elif look == "read":
                both.assert_equal()
            elif look == "state_dict":
                other = InstanceClassifier(COUNT, DIM, ACTIVE, seed=2, dtype=torch.float64)
                other.load_state_dict(both.classifier.state_dict())
                assert torch.equal(
                    other.read(torch.arange(COUNT))[0], both.classifier.read(torch.arange(COUNT))[0]
                )
                both.assert_equal()
            elif look == "write":
                weight, momentum = both.classifier.read(torch.tensor([7, 30]))
                both.classifier.write(torch.tensor([7, 30]), weight, momentum)
            both.optimizer.step()
            both.zero_grad()
            both.assert_equal()
        assert len(both.classifier.history) == 4


def test_loading_a_checkpoint_throws_gradients_away(both: Both) -> None:
    both.backward()
    both.step()
    both.zero_grad()
    state, rows = both.classifier.state_dict(), both.classifier.read(torch.arange(COUNT))
    both.backward()
    both.backward()
    both.classifier.load_state_dict(state)
    both.optimizer.step()
    assert len(both.classifier.history) == 1
    assert all(map(torch.equal, both.classifier.read(torch.arange(COUNT)), rows))


def test_is_in_no_state_and_in_no_copy() -> None:
    both = Both()
    both.backward()
    both.backward()
    assert both.classifier.carried is not None
    assert [name for name, _ in both.classifier.named_parameters()] == ["weight", "carried"]
    assert set(both.classifier.state_dict()) == {"weight", "momentum", "_extra_state"}
    assert both.optimizer.state_dict()["param_groups"][0]["params"] == [0]
    both.optimizer.load_state_dict(both.optimizer.state_dict())
    twin, optimizer = copy.deepcopy((both.classifier, both.optimizer))
    assert twin.carried is None
    assert optimizer.param_groups[0]["params"] is twin._gradients.trained
    assert twin._gradients.trained == [twin.weight]
    both.step()
    both.assert_equal()


def test_moves_with_the_classifier() -> None:
    both = Both()
    both.backward()
    both.backward()
    both.classifier.to("cpu", non_blocking=True)
    both.classifier._apply(lambda t: t.clone())
    both.step()
    both.assert_equal()


def by_hand_with_another_tensor(both: Both, grad: Tensor, dense: Tensor) -> None:
    both.classifier.weight.grad, both.dense.grad = grad, dense


def by_hand_in_place(both: Both, grad: Tensor, dense: Tensor) -> None:
    if both.classifier.weight.grad is None or both.dense.grad is None:
        by_hand_with_another_tensor(both, grad, dense)
    else:
        both.classifier.weight.grad.copy_(grad)
        both.dense.grad.copy_(dense)


@pytest.mark.parametrize("start", [by_hand_with_another_tensor, by_hand_in_place])
@pytest.mark.parametrize("batches", [1, 3])
def test_accumulated_by_hand_and_never_thrown_away(
    start: Callable[[Both, Tensor, Tensor], None], batches: int
) -> None:
    """A step has spent what rows carry that were evicted before it; the next gradient begins anew."""
    both = Both()
    for _ in range(4):
        for number in range(batches):
            (grad,) = torch.autograd.grad(both.losses()[0], [both.classifier.weight])
            dense = torch.zeros_like(both.dense).index_copy(0, both.classifier.active_instances, grad)
            if not number:
                start(both, grad, dense)
            else:
                assert both.classifier.weight.grad is not None
                assert both.dense.grad is not None
                both.classifier.weight.grad += grad
                both.dense.grad += dense
        both.step()
        both.assert_equal()


@pytest.mark.parametrize("activated", [False, True])
def test_a_spent_gradient_set_to_zero_by_hand(activated: bool) -> None:
    """Also after rows were exchanged beside it."""
    both = Both()
    for _ in range(4):
        losses = both.losses() if activated else None
        if both.dense.grad is not None:
            assert both.classifier.weight.grad is not None
            both.classifier.weight.grad.zero_()
            both.dense.grad.zero_()
        for loss in losses or both.losses():
            loss.backward()
        both.backward()
        both.step()
        both.assert_equal()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_a_graph_and_without_take_turns() -> None:
    """With one, the sum of gradients is another tensor."""
    both = Both()
    for _ in range(3):
        for graph in (True, False, True, False):
            loss, dense = both.losses()
            loss.backward(create_graph=graph)
            dense.backward()
        both.step()
        both.zero_grad()
        both.assert_equal()


def test_evaluation_in_inference_mode_between_batches() -> None:
    """What rows carry that it evicts is scaled, clipped and set to zero like any gradient."""
    both = Both()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        for _ in range(2):
            loss, dense = both.losses()
            scaler.scale(loss).backward()
            dense.backward()
            with torch.inference_mode():
                both.classifier.activate(torch.randint(COUNT, (BATCH,), generator=both.generator))
        assert both.classifier.carried is not None
        scaler.unscale_(both.optimizer)
        clip_norm(both.classifier.parameters())
        clip_norm([both.dense])
        scaler.step(both.optimizer)
        scaler.update()
        both.dense_optimizer.step()
        both.zero_grad(set_to_none=False)
        both.assert_equal()


@pytest.mark.parametrize("settings", [{}, {"use_buffers": True}])
def test_averages_of_a_model_see_the_same_parameters_after_every_step(settings: dict[str, Any]) -> None:
    """They go through those of the copy and of the model side by side."""
    both = Both()
    model = nn.ModuleDict({"classifier": both.classifier, "projection": nn.Linear(DIM, 1)})
    average = torch.optim.swa_utils.AveragedModel(model, **settings)
    for _ in range(3):
        both.zero_grad()
        both.backward()
        both.backward()
        assert both.classifier.carried is not None
        both.step()
        average.update_parameters(model)
    torch.testing.assert_close(average.module["projection"].weight, model["projection"].weight)


def test_a_step_for_backward_that_another_has_taken_the_place_of_is_not_taken() -> None:
    """It would move rows, and nobody would know."""
    for same in (True, False):
        both = Both()
        other = both.optimizer if same else DelayedSGD(both.classifier, **SETTINGS)
        target = both.classifier.activate(torch.arange(3))
        views = torch.randn(2, 3, DIM, dtype=torch.float64)
        updates = [optimizer.in_backward() for optimizer in (both.optimizer, other)]
        losses = [conic_loss(views, both.classifier.weight, target, update=update) for update in updates]
        rows = both.classifier.read(torch.arange(COUNT))
        with pytest.raises(RuntimeError, match="this step of SGD was withdrawn"):
            losses[0].backward()
        both.optimizer.step()
        assert all(map(torch.equal, both.classifier.read(torch.arange(COUNT)), rows))
        losses[1].backward()
        other.step()
        assert len(both.classifier.history) == 1


@pytest.mark.parametrize("taken", [False, True])
def test_loading_a_checkpoint_forgets_a_step_for_backward(taken: bool) -> None:
    both = Both()
    state = both.classifier.state_dict()
    target = both.classifier.activate(torch.arange(3))
    views = torch.randn(2, 3, DIM, dtype=torch.float64)
    loss = conic_loss(views, both.classifier.weight, target, update=both.optimizer.in_backward())
    if taken:
        loss.backward()
    both.classifier.load_state_dict(state)
    if not taken:
        with pytest.raises(RuntimeError, match=r"withdrawn|modified by an inplace operation"):
            loss.backward()
    both.backward()
    both.step()
    both.zero_grad()
    both.optimizer.in_backward()
    both.assert_equal()


class TestTheActiveSetNeverFillsUp:
    """Ten times as many instances as are active go through every loop."""

    @pytest.fixture
    def parts(self) -> tuple[InstanceClassifier, DelayedSGD]:
        classifier = InstanceClassifier(1000, 4, active=8)
        return classifier, DelayedSGD(classifier, lr=0.1)

    @staticmethod
    def loop(classifier: InstanceClassifier, then: Callable[[Tensor], Any]) -> None:
        for first in range(0, 80, 5):
            target = classifier.activate(torch.arange(first, first + 5))
            views = torch.randn(2, 5, 4, requires_grad=True)
            then(conic_loss(views, classifier.weight, target, num_instances=1000))

    def test_frozen_by_its_gradient(self, parts: tuple[InstanceClassifier, DelayedSGD]) -> None:
        def then(loss: Tensor) -> None:
            loss.backward()
            parts[0].weight.grad = None
            parts[1].step()

        self.loop(parts[0], then)
        assert not len(parts[0].history)

    @pytest.mark.parametrize("whose", ["module", "optimizer"])
    @pytest.mark.parametrize("step", [False, True])
    def test_zero_grad(self, parts: tuple[InstanceClassifier, DelayedSGD], whose: str, step: bool) -> None:
        def then(loss: Tensor) -> None:
            loss.backward()
            parts[0].zero_grad() if whose == "module" else parts[1].zero_grad()
            if step or whose == "module":
                parts[1].step()

        self.loop(parts[0], then)

    def test_the_gradient_thrown_away_by_hand_and_no_step(
        self, parts: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        def then(loss: Tensor) -> None:
            loss.backward()
            parts[0].weight.grad = None
            parts[1].zero_grad()

        self.loop(parts[0], then)

    def test_a_weight_that_requires_no_gradient(self, parts: tuple[InstanceClassifier, DelayedSGD]) -> None:
        parts[0].weight.requires_grad_(False)
        self.loop(parts[0], lambda loss: loss.backward())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_evaluation(self, parts: tuple[InstanceClassifier, DelayedSGD], mode: Any) -> None:
        with mode():
            self.loop(parts[0], lambda loss: None)

    def test_eval_mode(self, parts: tuple[InstanceClassifier, DelayedSGD]) -> None:
        parts[0].eval()
        self.loop(parts[0], lambda loss: None)

    def test_averaged_weights(self, parts: tuple[InstanceClassifier, DelayedSGD]) -> None:
        average = torch.optim.swa_utils.AveragedModel(parts[0])

        def then(loss: Tensor) -> None:
            loss.backward()
            parts[1].step()
            average.update_parameters(parts[0])
            parts[0].zero_grad()

        self.loop(parts[0], then)
        with torch.no_grad():
            self.loop(average.module, lambda loss: None)

    def test_what_is_evaluated_between_batches_leaves_theirs_alone(
        self, parts: tuple[InstanceClassifier, DelayedSGD]
    ) -> None:
        classifier, optimizer = parts
        target = classifier.activate(torch.arange(500, 503))
        loss = conic_loss(torch.randn(2, 3, 4), classifier.weight, target, num_instances=1000)
        loss.backward()
        with torch.no_grad():
            self.loop(classifier, lambda loss: None)
            assert torch.equal(classifier.activate(torch.arange(500, 503)), target)
        assert torch.equal(classifier.active_instances[target], torch.arange(500, 503))
        with pytest.raises(ValueError, match="distinct rows would be in use since the last optimiser step"):
            classifier.activate(torch.arange(6))
        optimizer.step()
        classifier.activate(torch.arange(6))

    def test_steps_that_a_loss_scaler_skips(self, parts: tuple[InstanceClassifier, DelayedSGD]) -> None:
        """Whoever throws the gradient away then."""
        classifier, optimizer = parts
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def then(loss: Tensor) -> None:
            scaler.scale(loss * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            classifier.zero_grad()

        self.loop(classifier, then)
        assert not len(classifier.history)
