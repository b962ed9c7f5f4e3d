"""Instance classification on every backend, against the pasted formula in float64."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from contrastive_ops import ConICLoss, conic_loss
from contrastive_ops._contract import PendingStep, SGDSettings
from tests.cases import (
    DTYPES,
    FULL_SIZE,
    LAYOUTS,
    ConICCase,
    conic_cases,
    require,
    rows,
    scales,
    temperatures,
)
from tests.oracles import (
    LAST_DIGIT,
    ORACLE_ERROR,
    assert_near,
    assert_no_worse_than_eager,
    conic_loss_and_gradients,
    conic_oracle,
    distance,
    last_digits,
)
from train_ref.eager import eager_conic


class TestAccuracy:
    @given(case=conic_cases)
    def test_float32_at_the_papers_temperature(self, backend: str, case: ConICCase) -> None:
        """1e-6 for losses and 1e-5 for gradients; where their terms cancel, twice the error of eager."""
        case = case.replace(batch=case.batch + 16)  # over a few rows either side's error is luck
        tensors = case.tensors()
        expected = conic_oracle(*tensors, **case.settings())
        eager = conic_loss_and_gradients(eager_conic, *tensors, **case.settings())
        actual = conic_loss_and_gradients(conic_loss, *tensors, **case.settings(), backend=backend)
        assert_no_worse_than_eager(
            actual,
            eager,
            expected,
            times=2,
            accurate=(1e-6, 1e-5, 1e-5),
            cancelling=LAST_DIGIT / case.temperature,
        )

    @given(case=conic_cases)
    def test_float64(self, backend: str, case: ConICCase) -> None:
        require(backend, torch.float64)
        case = case.replace(dtype=torch.float64)
        expected = conic_oracle(*case.tensors(), **case.settings())
        actual = conic_loss_and_gradients(conic_loss, *case.tensors(), **case.settings(), backend=backend)
        assert_near(actual, expected, (1e-12,) * 3, 10 * ORACLE_ERROR)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("classes", [1, 2, 10])
    @pytest.mark.parametrize(("similarity", "temperature"), [(-0.1, 0.1), (-0.3, 0.07), (-0.5, 0.02)])
    def test_negatives_that_are_all_below_zero(
        self, backend: str, dtype: torch.dtype, classes: int, similarity: float, temperature: float
    ) -> None:
        """A key that only fills up a tile, with zeros, would be the nearest of all."""
        require(backend, dtype)
        unit = torch.eye(16, dtype=torch.float64)
        views = torch.stack([unit[0] - 0.3 * unit[12], unit[0] - 0.3 * unit[13]])[:, None]
        weight = torch.stack(
            [unit[0]]
            + [similarity * unit[0] + math.sqrt(1 - similarity**2) * unit[i] for i in range(1, classes)]
        )
        tensors = views.to(dtype), weight.to(dtype), torch.zeros(1, dtype=torch.int64)
        settings = {"temperature": temperature, "consistency_weight": 1.0}
        actual = conic_loss_and_gradients(conic_loss, *tensors, **settings, backend=backend)
        near = (1e-5, 1e-5, 1e-5) if dtype == torch.float32 else (5e-2, 2e-2, 2e-2)
        assert_near(actual, conic_oracle(*tensors, **settings), near, 1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("weight_dtype", [None, torch.float32])
    @given(case=conic_cases)
    def test_half_precision_is_no_worse_than_eager(
        self, backend: str, case: ConICCase, dtype: torch.dtype, weight_dtype: torch.dtype | None
    ) -> None:
        """|fused − f64| ≤ |eager in the same dtype − f64| + a rounding of the input and of the result."""
        require(backend, dtype)
        case = case.replace(
            dtype=dtype, weight_dtype=weight_dtype, batch=case.batch + 16, dim=max(case.dim, 4)
        )
        views, weight, target = case.tensors()
        expected = conic_oracle(views, weight, target, **case.settings())
        eager = conic_loss_and_gradients(eager_conic, views, weight.to(dtype), target, **case.settings())
        actual = conic_loss_and_gradients(
            conic_loss, views, weight, target, **case.settings(), backend=backend
        )
        rounding = torch.finfo(dtype).eps
        assert_no_worse_than_eager(
            actual, eager, expected, rounding=rounding, cancelling=1e-3 * rounding / case.temperature
        )

    @given(
        case=conic_cases,
        kind=st.sampled_from(["plain", "all equal", "views equal", "on its row", "zero view", "zero row"]),
        temperature=temperatures,
        view_scale=scales,
        weight_scale=scales,
    )
    def test_adversarial_input_never_loses_to_eager(
        self, backend: str, case: ConICCase, kind: str, temperature: float, view_scale: float,
        weight_scale: float,
    ) -> None:  # fmt: skip
        case = case.replace(
            batch=case.batch + 16, dim=max(case.dim, 4), temperature=temperature, view_scale=view_scale,
            weight_scale=weight_scale,
        )  # fmt: skip
        views, weight, target = case.tensors()
        if kind == "all equal":
            weight = weight[:1].expand_as(weight)
        elif kind == "views equal":
            views = views[:1].expand_as(views)
        elif kind == "on its row":
            views = weight[target].expand_as(views)
        elif kind == "zero view":
            views = torch.cat([views[:, 1:], torch.zeros_like(views[:, :1])], 1)
        elif kind == "zero row":
            weight = torch.cat([weight[1:], torch.zeros_like(weight[:1])])
        expected = conic_oracle(views, weight, target, **case.settings())
        eager = conic_loss_and_gradients(eager_conic, views, weight, target, **case.settings())
        actual = conic_loss_and_gradients(
            conic_loss, views, weight, target, **case.settings(), backend=backend
        )
        slope = (1 / temperature + case.consistency_weight) * max(1, 1 / temperature)
        digits = last_digits(slope, rows=len(target))
        zero = kind.startswith("zero")  # there ∂x̂/∂x is 1e12
        of_view, of_row = (1e12 if zero else 1 / scale for scale in (view_scale, weight_scale))
        assert_no_worse_than_eager(
            actual,
            eager,
            expected,
            times=2,
            rounding=3e-7,
            cancelling=[ORACLE_ERROR + digits * magnified for magnified in (1, of_view, of_row)],
        )

    @pytest.mark.parametrize("sampled", [1, 20])
    def test_at_full_size(self, backend: str, sampled: int) -> None:
        case = ConICCase(batch=8, rows=FULL_SIZE, dim=128, sampled=sampled)
        expected = conic_oracle(*case.tensors(), **case.settings())
        actual = conic_loss_and_gradients(conic_loss, *case.tensors(), **case.settings(), backend=backend)
        assert_near(actual, expected, (1e-6, 1e-5, 1e-5))

    @pytest.mark.parametrize("views", [DTYPES[0], DTYPES[2]])
    @pytest.mark.parametrize("weight", DTYPES)
    def test_dtypes_are_the_arguments_own(
        self, backend: str, views: torch.dtype, weight: torch.dtype
    ) -> None:
        require(backend, views)
        case = ConICCase(batch=33, rows=200, dim=24, dtype=views, weight_dtype=weight)
        x, w, target = case.tensors()
        x.requires_grad_(), w.requires_grad_()
        loss = conic_loss(x, w, target, backend=backend)
        loss.backward()
        assert loss.dtype == torch.float32
        assert x.grad is not None
        assert w.grad is not None
        assert (x.grad.dtype, w.grad.dtype) == (views, weight)


class TestGradient:
    @pytest.mark.parametrize("consistency_weight", [0.0, 2.5])
    @pytest.mark.parametrize("views", [1, 2, 3])
    def test_gradcheck(self, backend: str, views: int, consistency_weight: float) -> None:
        require(backend, torch.float64)
        case = ConICCase(views=views, batch=3, rows=11, dim=5, dtype=torch.float64)
        x, weight, target = case.tensors()
        assert torch.autograd.gradcheck(
            lambda x, weight: conic_loss(
                x, weight, target, num_instances=50, temperature=0.2, consistency_weight=consistency_weight,
                reduction="none", backend=backend,
            ),
            (x.requires_grad_(), weight.requires_grad_()),
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("second_learns", [True, False])
    def test_two_towers(self, backend: str, dtype: torch.dtype, second_learns: bool) -> None:
        """A batch against another network's features of it: the mean of both directions' cross entropies, as
        CLIP has it, and one of them with keys that do not learn, as MoCo v3 has it."""
        require(backend, dtype)
        first, second = (rows(40, 24, seed, dtype) for seed in (0, 1))
        first.requires_grad_(), second.requires_grad_(second_learns)
        learning = [first, second][: 1 + second_learns]
        own, settings = torch.arange(40), {"temperature": 0.1, "consistency_weight": 0.0, "backend": backend}
        loss = conic_loss(first[None], second, own, **settings)
        if second_learns:
            loss = (loss + conic_loss(second[None], first, own, **settings)) / 2

        # Expected in extended precision: one in float64 is no more exact than what is tested.
        numbers = [x.detach().double().cpu().numpy().astype(np.longdouble) for x in (first, second)]
        norms = [np.sqrt((x * x).sum(1, keepdims=True)) for x in numbers]
        x, y = (x / norm for x, norm in zip(numbers, norms, strict=True))
        powers = np.exp(x @ y.T / np.longdouble(0.1))
        softmaxes = [powers / powers.sum(axis, keepdims=True) for axis in (1, 0)[: 1 + second_learns]]
        expected = float(np.mean([-np.log(np.diag(p)).mean() for p in softmaxes]))
        of_logits = (np.mean(softmaxes, 0) - np.eye(40)) / 40 / np.longdouble(0.1)
        gradients = [
            (grad - unit * (unit * grad).sum(1, keepdims=True)) / norm
            for unit, grad, norm in zip((x, y), (of_logits @ y, of_logits.T @ x), norms, strict=True)
        ]
        tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
        torch.testing.assert_close(loss.item(), expected, **tolerance)
        for a, e in zip(torch.autograd.grad(loss, learning), gradients[: len(learning)], strict=True):
            assert a.dtype == dtype
            error = np.linalg.norm((a.double().cpu().numpy() - e).astype(float))
            assert error <= 2 * torch.finfo(dtype).eps * np.linalg.norm(e.astype(float))

    def test_only_what_is_needed(self, backend: str) -> None:
        case = ConICCase()
        views, weight, target = case.tensors()
        _, of_views, of_weight = conic_loss_and_gradients(
            conic_loss, views, weight, target, **case.settings(), backend=backend
        )
        incoming = torch.linspace(0.5, 1.5, case.batch)
        for which, expected in enumerate((of_views, of_weight)):
            tensors = [views.detach().clone(), weight.detach().clone()]
            tensors[which].requires_grad_()
            loss = conic_loss(*tensors, target, **case.settings(), reduction="none", backend=backend)
            loss.backward(incoming)
            grad, other = tensors[which].grad, tensors[1 - which].grad
            assert grad is not None
            assert torch.equal(grad.double(), expected)
            assert other is None

    def test_a_weight_that_was_overwritten_before_backward_is_noticed(self, backend: str) -> None:
        views, weight, target = ConICCase().tensors()
        loss = conic_loss(views.requires_grad_(), weight.clone().requires_grad_(), target, backend=backend)
        loss.backward()
        changed = weight.clone()
        loss = conic_loss(views, changed, target, backend=backend)
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_float16_gradients_survive_small_incoming_ones(self, backend: str) -> None:
        """Both that of the mean over a batch and the softmax over many rows, on top of each other."""
        require(backend, torch.float16)
        case = ConICCase(batch=16, rows=3000, dim=16, dtype=torch.float16, weight_dtype=torch.float32)
        views, weight, target = case.tensors()
        expected = conic_oracle(views, weight, target, **case.settings())[2] * 1e-4
        weight.requires_grad_()
        loss = conic_loss(views, weight, target, **case.settings(), reduction="none", backend=backend)
        (actual,) = torch.autograd.grad(loss, weight, 1e-4 * torch.linspace(0.5, 1.5, case.batch))
        assert distance(actual.double(), expected) <= 2e-3 * expected.norm()


class TestUpdateInBackward:
    """Backward that takes a step of SGD instead of returning the weight's gradient."""

    SETTINGS: ClassVar[dict[str, Any]] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}

    @pytest.mark.parametrize("nesterov", [False, True])
    @given(case=conic_cases)
    def test_is_backward_then_a_step(self, backend: str, case: ConICCase, nesterov: bool) -> None:
        case = case.replace(weight_layout="rows")
        views, weight, target = case.tensors()
        buffer = rows(case.rows, case.dim, seed=7)
        expected = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([expected], **self.SETTINGS, nesterov=nesterov)
        optimizer.state[expected]["momentum_buffer"] = buffer.clone()
        views.requires_grad_()
        conic_loss(views, expected, target, **case.settings(), backend=backend).backward()
        assert expected.grad is not None
        assert views.grad is not None
        expected_grad, size = views.grad.clone(), expected.grad.norm()
        optimizer.step()

        views.grad = None
        weight.requires_grad_()
        version = weight._version
        step = PendingStep(buffer, SGDSettings(**self.SETTINGS, nesterov=nesterov))
        conic_loss(views, weight, target, **case.settings(), update=step, backend=backend).backward()
        assert step.taken
        assert weight.grad is None
        assert weight._version > version
        assert torch.equal(views.grad, expected_grad)
        tolerance = 1e-6 * (expected.norm() + size)
        assert (weight - expected).norm() <= tolerance
        assert (buffer - optimizer.state[expected]["momentum_buffer"]).norm() <= tolerance

    def test_is_taken_once(self, backend: str) -> None:
        views, weight, target = ConICCase().tensors()
        step = PendingStep(torch.zeros_like(weight), SGDSettings(**self.SETTINGS, nesterov=False))
        loss = conic_loss(views, weight.requires_grad_(), target, update=step, backend=backend)
        loss.backward(retain_graph=True)
        after = weight.detach().clone()
        with pytest.raises(RuntimeError, match=r"taken by an earlier backward|modified by an inplace"):
            loss.backward()
        assert torch.equal(weight, after)


class TestValue:
    def test_full_softmax_is_cross_entropy(self, backend: str) -> None:
        """A = N and β = 1: Exemplar-CNN's loss."""
        views, weight, target = ConICCase(batch=20, rows=40).tensors()
        loss = conic_loss(
            views, weight, target, num_instances=40, consistency_weight=0, reduction="none", backend=backend
        )
        logits = F.normalize(views, dim=2) @ F.normalize(weight, dim=1).T / 0.1
        expected = sum(F.cross_entropy(of_view, target, reduction="none") for of_view in logits)
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("num_instances", [None, 50, 1000, 10**9])
    def test_compensation_multiplies_the_negatives_alone(
        self, backend: str, num_instances: int | None
    ) -> None:
        """β = (N − 1)/(A − 1), written out in float64 term by term."""
        views, weight, target = ConICCase(views=1, batch=4, rows=50, dim=6).tensors()
        loss = conic_loss(
            views, weight, target, num_instances=num_instances, temperature=0.3, reduction="none",
            backend=backend,
        )  # fmt: skip
        beta = 1.0 if num_instances is None else (num_instances - 1) / (50 - 1)
        for i, own in enumerate(target.tolist()):
            x = F.normalize(views[0, i].double(), dim=0)
            e = [math.exp(float(F.normalize(row.double(), dim=0) @ x) / 0.3) for row in weight]
            denominator = e[own] + beta * (sum(e) - e[own])
            assert loss[i].item() == pytest.approx(-math.log(e[own] / denominator), rel=1e-6)

    @pytest.mark.parametrize(("sampled", "rows"), [(1, 7), (1, 1000), (30, 500)])
    def test_equal_similarities_give_a_logarithm(self, backend: str, sampled: int, rows: int) -> None:
        """log N, whatever part of the N rows is sampled."""
        views, weight = torch.ones(2, 3, 4), torch.full((rows, 4), 0.5)
        target = torch.arange(3, device=views.device)
        loss, metrics = conic_loss(
            views, weight, target, num_instances=sampled * rows, return_metrics=True, backend=backend
        )
        torch.testing.assert_close(loss.item(), 2 * math.log(sampled * rows), rtol=1e-6, atol=0)
        assert not metrics.positive_rank.any()
        assert metrics.consistency_loss.abs().max() <= 1e-12

    def test_a_single_row_has_nothing_to_be_told_from(self, backend: str) -> None:
        case = ConICCase(rows=1, consistency_weight=0.0)
        loss, of_views, of_weight = conic_loss_and_gradients(
            conic_loss, *case.tensors(), **case.settings(), backend=backend
        )
        assert not loss.any()
        assert not of_views.any()
        assert not of_weight.any()

    def test_loss_is_the_sum_of_its_metrics(self, backend: str) -> None:
        views, weight, target = ConICCase(views=3).tensors()
        loss, metrics = conic_loss(
            views.requires_grad_(), weight, target, reduction="none", return_metrics=True, backend=backend
        )
        assert metrics.classification_loss.shape == metrics.positive_rank.shape == (3, 8)
        torch.testing.assert_close(
            loss, metrics.classification_loss.sum(0) + 2.5 * metrics.consistency_loss, rtol=1e-5, atol=1e-5
        )
        assert not any(metric.requires_grad for metric in metrics)
        x = F.normalize(views, dim=2)
        pairs = sum((1 - (x[i] * x[j]).sum(1)) ** 2 for i in range(3) for j in range(3) if i != j)
        torch.testing.assert_close(metrics.consistency_loss, pairs, rtol=1e-5, atol=1e-6)

    @given(case=conic_cases)
    def test_rank_counts_the_rows_more_similar_than_its_own(self, backend: str, case: ConICCase) -> None:
        views, weight, target = case.tensors()
        _, metrics = conic_loss(views, weight, target, return_metrics=True, backend=backend)
        x, w = F.normalize(views.double(), dim=2), F.normalize(weight.double(), dim=1)
        lead = x @ w.T - (x * w[target]).sum(2, keepdim=True)
        lead = lead.masked_fill(F.one_hot(target, len(w)).bool(), -1.0)
        in_doubt = (lead.abs() <= 2e-6).sum(2)
        assert metrics.positive_rank.dtype == torch.int64
        assert ((metrics.positive_rank - (lead > 0).sum(2)).abs() <= in_doubt).all()

    def test_reductions(self, backend: str) -> None:
        tensors = ConICCase().tensors()
        loss = {r: conic_loss(*tensors, reduction=r, backend=backend) for r in ("mean", "sum", "none")}
        assert loss["none"].shape == (8,)
        torch.testing.assert_close(loss["sum"], loss["none"].sum())
        torch.testing.assert_close(loss["mean"], loss["none"].mean())

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("weight_layout", LAYOUTS)
    def test_strides_do_not_matter(self, backend: str, layout: str, weight_layout: str) -> None:
        plain = conic_loss_and_gradients(conic_loss, *ConICCase().tensors(), backend=backend)
        case = ConICCase(layout=layout, weight_layout=weight_layout)
        for a, b in zip(
            plain, conic_loss_and_gradients(conic_loss, *case.tensors(), backend=backend), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("poisoned", ["views", "weight"])
    def test_nan_in_gives_nan_out(self, backend: str, poisoned: str) -> None:
        views, weight, target = ConICCase().tensors()
        (views if poisoned == "views" else weight)[0, 0] = float("nan")
        loss, of_views, of_weight = conic_loss_and_gradients(
            conic_loss, views, weight, target, backend=backend
        )
        assert loss[0].isnan()
        assert of_views[0, 0].isnan().all()
        assert of_weight.isnan().any()

    def test_equal_input_gives_equal_bits(self, backend: str) -> None:
        case = ConICCase(batch=40, rows=700, dim=64)
        first, second = (
            conic_loss_and_gradients(conic_loss, *case.tensors(), backend=backend) for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


class TestManners:
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, backend: str, requires_grad: bool) -> None:
        views, weight, target = ConICCase().tensors()
        views.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
        opcheck(torch.ops.contrastive_ops.conic.default, (views, weight, target, 0.1, 20.0, 2.5, backend))

    def test_opcheck_of_backward(self, backend: str) -> None:
        views, weight, target = ConICCase().tensors()
        *_, statistics = torch.ops.contrastive_ops.conic(views, weight, target, 0.1, 20.0, 2.5, backend)
        grad_loss, buffer = torch.ones(len(target)), torch.zeros_like(weight)
        arguments = (target, statistics, 0.1, 2.5)
        for need in ((True, True), (True, False), (False, True)):
            opcheck(
                torch.ops.contrastive_ops.conic_backward.default,
                (grad_loss, views, weight, *arguments, *need, backend),
            )
        opcheck(
            torch.ops.contrastive_ops.conic_backward_sgd_.default,
            (grad_loss, views, weight, buffer, *arguments, 0.1, 0.9, 1e-4, False, backend),
        )

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_without_graph_breaks(self, backend: str, dynamic: bool) -> None:
        @torch.compile(fullgraph=True, dynamic=dynamic)
        def step(views: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return 3 * conic_loss(2 * views, weight, target, num_instances=1000, backend=backend)

        for batch in (6, 9):
            views, weight, target = ConICCase(batch=batch).tensors()
            views.requires_grad_(), weight.requires_grad_()
            loss = step(views, weight, target)
            gradients = torch.autograd.grad(loss, (views, weight))
            expected = 3 * conic_loss(2 * views, weight, target, num_instances=1000, backend=backend)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients, torch.autograd.grad(expected, (views, weight)))

    def test_double_backward_says_so(self, backend: str) -> None:
        views, weight, target = ConICCase().tensors()
        loss = conic_loss(views.requires_grad_(), weight, target, backend=backend)
        (gradient,) = torch.autograd.grad(loss, views, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.sum().backward()

    def test_under_autocast_the_weight_keeps_its_dtype(self, backend: str) -> None:
        views, weight, target = ConICCase(dim=8).tensors()
        layer, weight = torch.nn.Linear(8, 8), torch.nn.Parameter(weight)
        with torch.autocast(views.device.type, dtype=torch.float16):
            output = layer(views)
            loss = conic_loss(output, weight, target, backend=backend)
        assert output.dtype == torch.float16
        assert loss.dtype == torch.float32
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert torch.isfinite(layer.weight.grad).all()


def call(**changes: Any) -> Any:
    views, weight, target = ConICCase(batch=4, rows=6, dim=3).tensors()
    return conic_loss(**({"views": views, "weight": weight, "target": target} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"views": [[1.0]]}, TypeError, r"views must be a torch.Tensor, got list"),
        (
            {"views": torch.zeros(4, 3)},
            ValueError,
            r"views must have 3 dimensions \(V, B, D\), got .*\(4, 3\)",
        ),
        ({"views": torch.zeros(2, 0, 3)}, ValueError, r"views must not be empty, got shape \(2, 0, 3\)"),
        ({"views": torch.zeros(2, 4, 3, dtype=torch.int32)}, TypeError, r"views must be of dtype .*int32"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight must have 2 dimensions"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight must not be empty"),
        ({"weight": torch.zeros(6, 2)}, ValueError, r"weight must be \(A, D\) with D = 3 .*got \(6, 2\)"),
        ({"target": [0, 1, 2, 3]}, TypeError, r"target must be a torch.Tensor, got list"),
        ({"target": torch.zeros(4)}, TypeError, r"target must be of dtype int64, got torch.float32"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target must be \(B,\) with B = 4"),
        (
            {"target": torch.tensor([0, 1, 2, 6])},
            ValueError,
            r"target must be rows of weight, from 0 to 5, got",
        ),
        ({"target": torch.tensor([0, -1, 2, 3])}, ValueError, r"target must be rows of weight"),
        ({"weight": torch.zeros(6, 3, device="meta")}, ValueError, r"weight must be on the device of views"),
        ({"num_instances": 5}, ValueError, r"num_instances must be at least the 6 rows of weight, got 5"),
        ({"num_instances": 1e6}, TypeError, r"num_instances must be an integer or None, got float"),
        ({"temperature": 0}, ValueError, r"temperature must be finite and > 0, got 0"),
        ({"consistency_weight": -1}, ValueError, r"consistency_weight must be finite and >= 0, got -1"),
        ({"reduction": "average"}, ValueError, r"reduction must be 'mean', 'sum' or 'none'"),
        ({"return_metrics": 1}, TypeError, r"return_metrics must be True or False, got 1"),
        ({"backend": "gpu"}, ValueError, r"unknown backend 'gpu'"),
    ],
)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_module_computes_the_function() -> None:
    tensors = ConICCase().tensors()
    module = ConICLoss(num_instances=1000, temperature=0.2)
    assert torch.equal(module(*tensors), conic_loss(*tensors, num_instances=1000, temperature=0.2))
    assert "num_instances=1000" in repr(module)
