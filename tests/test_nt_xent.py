"""NT-Xent and CO2 on it, on every backend, against the pasted formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from contrastive_ops import NTXentLoss, nt_xent_loss
from tests.cases import LAYOUTS, NTXentCase, nt_xent_cases, require, rows, scales, temperatures
from tests.oracles import (
    LAST_DIGIT,
    ORACLE_ERROR,
    assert_near,
    assert_no_worse_than_eager,
    distance,
    last_digits,
    nt_xent_loss_and_gradients,
    nt_xent_oracle,
)
from train_ref.eager import eager_nt_xent

# SimCLR's temperature, on ImageNet and on small images.
paper_temperatures = st.sampled_from([0.1, 0.5])


def evaluate(backend: str, case: NTXentCase) -> tuple[Tensor, Tensor]:
    return nt_xent_loss_and_gradients(nt_xent_loss, *case.tensors(), **case.settings(), backend=backend)


class TestAccuracy:
    @given(case=nt_xent_cases, temperature=paper_temperatures)
    def test_float32_at_the_papers_temperatures(
        self, backend: str, case: NTXentCase, temperature: float
    ) -> None:
        """1e-6 for losses and 1e-5 for gradients; where their terms cancel, twice the error of eager."""
        case = case.replace(temperature=temperature, batch=case.batch + 16)
        expected = nt_xent_oracle(*case.tensors(), **case.settings())
        eager = nt_xent_loss_and_gradients(eager_nt_xent, *case.tensors(), **case.settings())
        assert_no_worse_than_eager(
            evaluate(backend, case),
            eager,
            expected,
            times=2,
            accurate=(1e-6, 1e-5),
            cancelling=LAST_DIGIT / temperature,
        )

    @given(case=nt_xent_cases)
    def test_float64(self, backend: str, case: NTXentCase) -> None:
        require(backend, torch.float64)
        case = case.replace(dtype=torch.float64)
        expected = nt_xent_oracle(*case.tensors(), **case.settings())
        assert_near(evaluate(backend, case), expected, (1e-12,) * 2, 10 * ORACLE_ERROR)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @given(case=nt_xent_cases)
    def test_half_precision_is_no_worse_than_eager(
        self, backend: str, case: NTXentCase, dtype: torch.dtype
    ) -> None:
        """|fused − f64| ≤ |eager in the same dtype − f64| + a rounding of the input and of the result."""
        require(backend, dtype)
        case = case.replace(dtype=dtype, batch=case.batch + 16, dim=max(case.dim, 4))
        expected = nt_xent_oracle(*case.tensors(), **case.settings())
        eager = nt_xent_loss_and_gradients(eager_nt_xent, *case.tensors(), **case.settings())
        rounding = torch.finfo(dtype).eps
        assert_no_worse_than_eager(
            evaluate(backend, case),
            eager,
            expected,
            rounding=rounding,
            cancelling=1e-3 * rounding / case.temperature,
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rows_that_are_all_alike(self, backend: str, dtype: torch.dtype) -> None:
        """Similarities near 1 have the largest exponentials."""
        require(backend, dtype)
        common = rows(1, 32, 9, torch.float64)
        views = [(common + 0.2 * rows(150, 32, seed, torch.float64)).to(dtype) for seed in (1, 2)]
        settings = NTXentCase(temperature=0.1, consistency_temperature=0.04).settings()
        allowed = (1e-6, 1e-5) if dtype == torch.float32 else (1e-3, 2e-2)
        actual = nt_xent_loss_and_gradients(nt_xent_loss, *views, **settings, backend=backend)
        assert_near(actual, nt_xent_oracle(*views, **settings), allowed)

    @given(
        case=nt_xent_cases,
        kind=st.sampled_from(["plain", "all equal", "views equal", "zero row"]),
        temperature=temperatures,
        consistency_temperature=temperatures,
        scale=scales,
    )
    def test_adversarial_input_never_loses_to_eager(
        self, backend: str, case: NTXentCase, kind: str, temperature: float, consistency_temperature: float,
        scale: float,
    ) -> None:  # fmt: skip
        case = case.replace(
            batch=case.batch + 16, dim=max(case.dim, 4), temperature=temperature, scale=scale,
            consistency_temperature=consistency_temperature, normalize=True,
        )  # fmt: skip
        view1, view2 = case.tensors()
        if kind == "all equal":
            view1 = view2 = view1[:1].expand_as(view1)
        elif kind == "views equal":
            view2 = view1
        elif kind == "zero row":
            view1 = torch.cat([view1[1:], torch.zeros_like(view1[:1])])
        settings = case.settings()
        expected = nt_xent_oracle(view1, view2, **settings)
        eager = nt_xent_loss_and_gradients(eager_nt_xent, view1, view2, **settings)
        actual = nt_xent_loss_and_gradients(nt_xent_loss, view1, view2, **settings, backend=backend)
        sharpness = 1 / temperature + case.consistency_weight / consistency_temperature
        digits = last_digits(sharpness * max(1, sharpness), rows=2 * case.batch)
        magnified = 1e12 if kind == "zero row" else 1 / scale  # ∂x̂/∂x
        assert_no_worse_than_eager(
            actual,
            eager,
            expected,
            times=2,
            rounding=3e-7,
            cancelling=(ORACLE_ERROR + digits, ORACLE_ERROR + digits * magnified),
        )

    def test_at_simclrs_size(self, backend: str) -> None:
        case = NTXentCase(batch=512 if backend in ("cpu", "reference") else 128, dim=128, temperature=0.1)
        expected = nt_xent_oracle(*case.tensors(), **case.settings())
        assert_near(evaluate(backend, case), expected, (1e-6, 1e-5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes_are_the_arguments_own(self, backend: str, dtype: torch.dtype) -> None:
        require(backend, dtype)
        views = [view.requires_grad_() for view in NTXentCase(batch=33, dim=24, dtype=dtype).tensors()]
        loss = nt_xent_loss(*views, consistency_weight=1.0, backend=backend)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(view.grad is not None and view.grad.dtype == dtype for view in views)


class TestGradient:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_gradcheck(self, backend: str, batch: int, normalize: bool) -> None:
        """Without the consistency term: its pseudo-label, too, would move in a finite difference."""
        require(backend, torch.float64)
        views = NTXentCase(batch=batch, dim=5, dtype=torch.float64, normalize=normalize).tensors()
        assert torch.autograd.gradcheck(
            lambda *views: nt_xent_loss(*views, normalize=normalize, reduction="none", backend=backend),
            [view.requires_grad_() for view in views],
        )

    def test_through_the_pseudo_label_the_consistency_would_pull_twice_as_much(self, backend: str) -> None:
        """As the docstring has it: the mean's derivative along a direction, by finite differences, has the
        change of P in it."""
        require(backend, torch.float64)
        case = NTXentCase(dtype=torch.float64, consistency_temperature=0.3)
        views = torch.stack(case.tensors())
        direction = torch.stack(NTXentCase(dtype=torch.float64, seed=5).tensors())

        def loss(views: Tensor, weight: float) -> Tensor:
            settings = case.settings() | {"consistency_weight": weight}
            return nt_xent_loss(*views, **settings, backend=backend)

        def consistency(views: Tensor) -> Tensor:
            return loss(views, 1.0) - loss(views, 0.0)

        step = 1e-5
        slope = (consistency(views + step * direction) - consistency(views - step * direction)) / (2 * step)
        views.requires_grad_()
        (gradient,) = torch.autograd.grad(consistency(views), views)
        torch.testing.assert_close(slope, 2 * (gradient * direction).sum(), rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_view_without_gradient(self, backend: str, which: int) -> None:
        case = NTXentCase()
        views = list(case.tensors())
        _, expected = nt_xent_loss_and_gradients(nt_xent_loss, *views, **case.settings(), backend=backend)
        views[which].requires_grad_()
        loss = nt_xent_loss(*views, **case.settings(), reduction="none", backend=backend)
        loss.backward(torch.linspace(0.5, 1.5, 2 * case.batch))
        assert torch.equal(views[which].grad.double(), expected[which])
        assert views[1 - which].grad is None

    def test_incoming_gradients_of_any_stride(self, backend: str) -> None:
        """That of a mean is one number, expanded."""
        views, settings = torch.stack(NTXentCase().tensors()), (0.5, 0.05, 1.0, True, backend)
        *_, statistics = torch.ops.contrastive_ops.nt_xent(views, *settings)
        of_ones, of_expanded, of_strided = (
            torch.ops.contrastive_ops.nt_xent_backward(incoming, views, statistics, *settings)
            for incoming in (torch.ones(16), torch.ones(1).expand(16), torch.ones(32)[::2])
        )
        assert torch.equal(of_expanded, of_ones)
        assert torch.equal(of_strided, of_ones)

    def test_float16_gradients_survive_small_incoming_ones(self, backend: str) -> None:
        """Both that of the mean over a batch and the softmax over its rows, on top of each other."""
        require(backend, torch.float16)
        case = NTXentCase(batch=300, dim=16, dtype=torch.float16, scale=10.0)
        views = case.tensors()
        expected = nt_xent_oracle(*views, **case.settings())[1] * 1e-3
        incoming = 1e-3 * torch.linspace(0.5, 1.5, 600)
        views = [view.float().half().requires_grad_() for view in views]
        loss = nt_xent_loss(*views, **case.settings(), reduction="none", backend=backend)
        actual = torch.stack(torch.autograd.grad(loss, views, incoming)).double()
        # What is left is the rounding of gradients near float16's smallest number, in the result.
        assert distance(actual, expected) <= 5e-3 * expected.norm() + 3e-8 * expected.numel() ** 0.5


class TestValue:
    def test_is_cross_entropy_over_the_other_rows(self, backend: str) -> None:
        view1, view2 = NTXentCase(batch=20).tensors()
        loss = nt_xent_loss(view1, view2, temperature=0.5, backend=backend)
        z = F.normalize(torch.cat([view1, view2]), dim=1)
        logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(40).roll(20).to(z.device)))

    @pytest.mark.parametrize("batch", [1, 2, 50, 300])
    def test_equal_rows_give_a_logarithm(self, backend: str, batch: int) -> None:
        """log(2 B − 1), and nothing to disagree about."""
        view = torch.ones(batch, 4)  # whose similarities have no rounding that could break ties
        loss, metrics = nt_xent_loss(
            view, view, consistency_weight=1.0, return_metrics=True, reduction="none", backend=backend
        )
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2 * batch - 1)))
        assert not metrics.positive_rank.any()
        assert metrics.consistency_loss.abs().max() <= 1e-6

    def test_a_single_instance_has_nothing_to_be_told_from(self, backend: str) -> None:
        loss, gradient = evaluate(backend, NTXentCase(batch=1))
        assert not loss.any()
        assert not gradient.any()

    @pytest.mark.parametrize("batch", [1, 2, 33, 70])
    def test_statistics_are_the_references(self, backend: str, batch: int) -> None:
        views, settings = torch.stack(NTXentCase(batch=batch).tensors()), (0.5, 0.05, 1.0, True)
        *_, actual = torch.ops.contrastive_ops.nt_xent(views, *settings, backend)
        *_, expected = torch.ops.contrastive_ops.nt_xent(views.double(), *settings, "reference")
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_both_views_of_an_instance_have_the_same_consistency(self, backend: str) -> None:
        case = NTXentCase(batch=40)
        _, metrics = nt_xent_loss(*case.tensors(), **case.settings(), return_metrics=True, backend=backend)
        first, second = metrics.consistency_loss.chunk(2)
        assert first.min() > 0
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)

    def test_loss_is_the_sum_of_its_metrics(self, backend: str) -> None:
        case = NTXentCase()
        view1, view2 = case.tensors()
        loss, metrics = nt_xent_loss(
            view1.requires_grad_(), view2, **case.settings(), reduction="none", return_metrics=True,
            backend=backend,
        )  # fmt: skip
        assert loss.shape == metrics.instance_loss.shape == metrics.positive_rank.shape == (16,)
        terms = metrics.instance_loss + case.consistency_weight * metrics.consistency_loss
        torch.testing.assert_close(loss, terms, rtol=1e-5, atol=1e-5)
        assert not any(metric.requires_grad for metric in metrics)

    @given(case=nt_xent_cases)
    def test_rank_counts_the_negatives_more_similar_than_the_positive(
        self, backend: str, case: NTXentCase
    ) -> None:
        views = case.tensors()
        _, metrics = nt_xent_loss(*views, **case.settings(), return_metrics=True, backend=backend)
        z = F.normalize(torch.cat(views).double(), dim=1)
        lead = z @ z.T - (z * z.roll(case.batch, 0)).sum(1, keepdim=True)
        own = torch.eye(case.batch, dtype=torch.bool, device=z.device).repeat(2, 2)
        lead = lead.masked_fill(own, -1.0)
        in_doubt = (lead.abs() <= 2e-6).sum(1)
        assert metrics.positive_rank.dtype == torch.int64
        assert ((metrics.positive_rank - (lead > 0).sum(1)).abs() <= in_doubt).all()

    def test_reductions(self, backend: str) -> None:
        views = NTXentCase().tensors()
        loss = {r: nt_xent_loss(*views, reduction=r, backend=backend) for r in ("mean", "sum", "none")}
        assert loss["none"].shape == (16,)
        torch.testing.assert_close(loss["sum"], loss["none"].sum())
        torch.testing.assert_close(loss["mean"], loss["none"].mean())

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_do_not_matter(self, backend: str, layout: str) -> None:
        for a, b in zip(
            evaluate(backend, NTXentCase()), evaluate(backend, NTXentCase(layout=layout)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("poisoned", [0, 1])
    def test_nan_in_gives_nan_out(self, backend: str, poisoned: int) -> None:
        """Every other row has the poisoned one among its negatives."""
        views = NTXentCase().tensors()
        views[poisoned][0, 0] = float("nan")
        loss, gradient = nt_xent_loss_and_gradients(nt_xent_loss, *views, backend=backend)
        assert loss.isnan().all()
        assert gradient.isnan().all()

    def test_equal_input_gives_equal_bits(self, backend: str) -> None:
        case = NTXentCase(batch=200, dim=64)
        for a, b in zip(evaluate(backend, case), evaluate(backend, case), strict=True):
            assert torch.equal(a, b)


class TestManners:
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    def test_opcheck(self, backend: str, requires_grad: bool, consistency_weight: float) -> None:
        views = torch.stack(NTXentCase().tensors()).requires_grad_(requires_grad)
        settings = (0.5, 0.05, consistency_weight, True, backend)
        opcheck(torch.ops.contrastive_ops.nt_xent.default, (views, *settings))

    def test_opcheck_of_backward(self, backend: str) -> None:
        views, settings = torch.stack(NTXentCase().tensors()), (0.5, 0.05, 1.0, True, backend)
        *_, statistics = torch.ops.contrastive_ops.nt_xent(views, *settings)
        opcheck(
            torch.ops.contrastive_ops.nt_xent_backward.default, (torch.ones(16), views, statistics, *settings)
        )

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_without_graph_breaks(self, backend: str, dynamic: bool) -> None:
        def step(view1: Tensor, view2: Tensor) -> Tensor:
            return 3 * nt_xent_loss(2 * view1, view2, consistency_weight=1.0, backend=backend)

        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
        for batch in (6, 9):
            views = [view.requires_grad_() for view in NTXentCase(batch=batch).tensors()]
            loss, expected = compiled(*views), step(*views)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views))

    def test_views_overwritten_before_backward_change_nothing(self, backend: str) -> None:
        """The operator works on a copy of both."""
        case = NTXentCase()
        _, expected = evaluate(backend, case)
        view1, view2 = case.tensors()
        loss = nt_xent_loss(
            view1.requires_grad_(), view2, **case.settings(), reduction="none", backend=backend
        )
        view2.zero_()
        loss.backward(torch.linspace(0.5, 1.5, 16))
        assert torch.equal(view1.grad.double(), expected[0])

    def test_double_backward_says_so(self, backend: str) -> None:
        view1, view2 = NTXentCase().tensors()
        loss = nt_xent_loss(view1.requires_grad_(), view2, backend=backend)
        (gradient,) = torch.autograd.grad(loss, view1, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.sum().backward()

    def test_autocast_leaves_the_loss_in_float32(self, backend: str) -> None:
        view1, view2 = NTXentCase(dim=8).tensors()
        layer = torch.nn.Linear(8, 8)
        with torch.autocast(view1.device.type, dtype=torch.float16):
            loss = nt_xent_loss(layer(view1), layer(view2), consistency_weight=1.0, backend=backend)
        assert loss.dtype == torch.float32
        loss.backward()
        assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"view1": [[1.0]]}, TypeError, r"view1 must be a torch.Tensor, got list"),
        ({"view1": torch.zeros(4)}, ValueError, r"view1 must have 2 dimensions \(B, D\), got .*\(4,\)"),
        ({"view1": torch.zeros(0, 3)}, ValueError, r"view1 must not be empty, got shape \(0, 3\)"),
        ({"view2": torch.zeros(5, 3)}, ValueError, r"view2 must have the shape of view1, .*got \(5, 3\)"),
        ({"view2": torch.zeros(4, 3).double()}, TypeError, r"view2 must have the dtype of view1, .*float64"),
        ({"view2": torch.zeros(4, 3, device="meta")}, ValueError, r"view2 must be on the device of view1"),
        ({"view2": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, r"view2 must be of dtype .*int32"),
        ({"temperature": 0}, ValueError, r"temperature must be finite and > 0, got 0"),
        ({"consistency_temperature": -1}, ValueError, r"consistency_temperature must be finite and > 0"),
        ({"consistency_weight": float("nan")}, ValueError, r"consistency_weight must be finite and >= 0"),
        ({"normalize": 1}, TypeError, r"normalize must be True or False, got 1"),
        ({"reduction": "average"}, ValueError, r"reduction must be 'mean', 'sum' or 'none'"),
        ({"backend": "gpu"}, ValueError, r"unknown backend 'gpu'"),
    ],
)  # fmt: skip
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nt_xent_loss(**({"view1": torch.ones(4, 3), "view2": torch.ones(4, 3)} | changes))


def test_the_module_computes_the_function() -> None:
    views = NTXentCase().tensors()
    module = NTXentLoss(temperature=0.1, consistency_weight=0.5)
    assert torch.equal(module(*views), nt_xent_loss(*views, temperature=0.1, consistency_weight=0.5))
    assert "consistency_weight=0.5" in repr(module)
