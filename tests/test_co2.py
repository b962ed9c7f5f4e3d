"""The queue losses on every backend, against the pasted formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from contrastive_ops import co2_loss, consistency_loss, info_nce_loss
from tests.cases import (
    DTYPES,
    FULL_SIZE,
    LAYOUTS,
    PAPERS,
    Case,
    cases,
    lay_out,
    paper_settings,
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
    distance,
    fused,
    last_digits,
    loss_and_gradient,
    oracle,
)
from train_ref.eager import eager_co2


def sharpness(case: Case) -> float:
    """How much a similarity of unit vectors moves a row's loss, at most."""
    return 1 / case.temperature + case.consistency_weight / case.consistency_temperature


class TestAccuracy:
    @given(case=cases, settings=paper_settings)
    def test_float32_at_the_papers_temperatures(self, backend: str, case: Case, settings: dict) -> None:
        """1e-6 for losses and 1e-5 for gradients, but for what no float32 input can carry: rows whose terms
        nearly cancel. There, as everywhere, twice the error of eager float32 is the bound."""
        case = case.replace(batch=case.batch + 16, **settings)  # over a few rows either side's error is luck
        tensors = case.tensors()
        few_terms = 0.0  # which may cancel: what a similarity's last digit does to them
        if case.keys < 50:
            few_terms = 1e-8 * sharpness(case) * len(tensors[0]) ** 0.5
        assert_no_worse_than_eager(
            fused(*tensors, **case.settings(), backend=backend),
            loss_and_gradient(eager_co2, *tensors, **case.settings()),
            oracle(*tensors, **case.settings()),
            times=2,
            accurate=(1e-6, 1e-5),
            cancelling=(few_terms + ORACLE_ERROR, LAST_DIGIT / case.temperature),
        )

    @given(case=cases, settings=paper_settings)
    def test_float64(self, backend: str, case: Case, settings: dict) -> None:
        require(backend, torch.float64)
        case = case.replace(dtype=torch.float64, **settings)
        tensors = case.tensors()
        loss, gradient = oracle(*tensors, **case.settings())
        actual_loss, actual_gradient = fused(*tensors, **case.settings(), backend=backend)
        assert distance(actual_loss, loss) <= 1e-13 * loss.norm() + ORACLE_ERROR
        # α/τc = 250 multiplies terms that may cancel
        assert distance(actual_gradient, gradient) <= 1e-12 * gradient.norm() + 10 * ORACLE_ERROR

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @given(case=cases, same_queue=st.booleans(), settings=paper_settings)
    def test_half_precision_is_no_worse_than_eager(
        self, backend: str, case: Case, dtype: torch.dtype, same_queue: bool, settings: dict
    ) -> None:
        """|fused − f64| ≤ |eager in the same dtype − f64| + a rounding of the input and of the result."""
        require(backend, dtype)
        # As in the other tests: over a few rows or keys, or in one dimension, either side's error is luck.
        sizes = {"batch": case.batch + 16, "keys": max(case.keys, 16), "dim": max(case.dim, 4)}
        case = case.replace(dtype=dtype, **sizes, **settings)
        query, key, queue = case.tensors()
        if not same_queue:
            queue = queue.float()
        rounding = torch.finfo(dtype).eps
        assert_no_worse_than_eager(
            fused(query, key, queue, **case.settings(), backend=backend),
            loss_and_gradient(eager_co2, query, key, queue.to(dtype), **case.settings()),
            oracle(query, key, queue, **case.settings()),
            rounding=rounding,
            # s_+ is off by a rounding of its unit vectors, at worst; the temperatures magnify that.
            cancelling=(0.0, 1e-3 * rounding * sharpness(case)),
        )

    @pytest.mark.parametrize("queue_dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("queue_layout", LAYOUTS)
    def test_queue_of_another_dtype(self, backend: str, queue_dtype: torch.dtype, queue_layout: str) -> None:
        """A queue in half precision costs nothing more than its own rounding."""
        case = Case(batch=33, keys=200, dim=24, queue_dtype=queue_dtype, queue_layout=queue_layout)
        actual = fused(*case.tensors(), **case.settings(), backend=backend)
        assert_near(actual, oracle(*case.tensors(), **case.settings()), (1e-6, 1e-5))

    @given(
        case=cases,
        kind=st.sampled_from(["plain", "all equal", "holds a query", "holds a key", "same view", "one key"]),
        temperature=temperatures,
        consistency_temperature=temperatures,
        queue_scale=scales,
    )
    def test_adversarial_input_never_loses_to_eager(
        self, backend: str, case: Case, kind: str, temperature: float, consistency_temperature: float,
        queue_scale: float,
    ) -> None:  # fmt: skip
        case = case.replace(
            batch=case.batch + 16,
            dim=max(case.dim, 4),  # in one dimension rows are alike: eager's luck would be that of all
            temperature=temperature,
            consistency_temperature=consistency_temperature,
            queue_scale=queue_scale,
        )
        query, key, queue = case.tensors()
        if kind == "all equal":
            queue = queue[:1].expand_as(queue)
        elif kind == "holds a query":
            queue = torch.cat([queue, torch.nn.functional.normalize(query[:1], dim=1)])
        elif kind == "holds a key":
            queue = torch.cat([queue, torch.nn.functional.normalize(key[:1], dim=1)])
        elif kind == "same view":
            key = query
        elif kind == "one key":
            queue = queue[:1]
        longest = queue.norm(dim=1).max().item()
        slope = longest * sharpness(case)
        largest_logit = max(1, longest / min(temperature, consistency_temperature))
        assert_no_worse_than_eager(
            fused(query, key, queue, **case.settings(), backend=backend),
            loss_and_gradient(eager_co2, query, key, queue, **case.settings()),
            oracle(query, key, queue, **case.settings()),
            times=2,
            rounding=3e-7,
            cancelling=(
                ORACLE_ERROR + last_digits(slope, rows=len(query)),
                last_digits(slope * largest_logit, times=20),
            ),
        )

    @pytest.mark.parametrize("settings", PAPERS)
    def test_at_full_size(self, backend: str, settings: dict) -> None:
        """K = 65536, where sums are long: a float sum taken term by term would be off by 1e-5."""
        case = Case(batch=16, keys=FULL_SIZE, dim=128, **settings)
        actual = fused(*case.tensors(), **case.settings(), backend=backend)
        assert_near(actual, oracle(*case.tensors(), **case.settings()), (1e-6, 1e-5))


class TestGradient:
    # Not with include_positive: there a finite difference would also move s_+ in the pseudo-label P, through
    # which no gradient passes. The oracle, which detaches P, covers it.
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("consistency_weight", [0.0, 10.0])
    def test_gradcheck(self, backend: str, normalize: bool, consistency_weight: float) -> None:
        require(backend, torch.float64)
        query, key, queue = Case(batch=3, keys=11, dim=5, dtype=torch.float64).tensors()
        assert torch.autograd.gradcheck(
            lambda q: co2_loss(
                q, key, queue, temperature=0.2, consistency_temperature=0.1, normalize=normalize,
                consistency_weight=consistency_weight, reduction="none", backend=backend,
            ),
            query.requires_grad_(),
        )  # fmt: skip

    def test_gradcheck_of_consistency_alone(self, backend: str) -> None:
        require(backend, torch.float64)
        query, key, queue = Case(batch=3, keys=11, dim=5, dtype=torch.float64).tensors()
        assert torch.autograd.gradcheck(
            lambda q: consistency_loss(q, key, queue, temperature=0.1, backend=backend),
            query.requires_grad_(),
        )

    def test_include_positive_is_a_ports_value_but_not_its_gradient(self, backend: str) -> None:
        """Public ports put s_+ into P with its gradient. What that adds stands in the docstring."""
        case = Case(batch=24, keys=60, dtype=torch.float64, include_positive=True)
        require(backend, case.dtype)
        query, key, queue = case.tensors()
        settings = {"temperature": 0.05, "include_positive": True, "backend": backend}
        value, gradient = loss_and_gradient(consistency_loss, query, key, queue, **settings)

        query.requires_grad_()
        unit, unit_key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
        positive = (unit * unit_key).sum(1, keepdim=True)
        log_q, log_p = (
            torch.log_softmax(torch.cat([positive, rows @ queue.T], 1) / 0.05, 1) for rows in (unit, unit_key)
        )
        port = 0.5 * ((log_q.exp() - log_p.exp()) * (log_q - log_p)).sum(1)
        (of_port,) = torch.autograd.grad(port.sum(), query, retain_graph=True)
        torch.testing.assert_close(value, port.detach())
        assert distance(gradient, of_port) > 0.1 * of_port.norm()

        q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
        added = 0.5 * (p[:, 0] * (1 + (p * d).sum(1) - d[:, 0]) - q[:, 0]) / 0.05
        (through_p,) = torch.autograd.grad(positive.squeeze(1), query, added.detach())
        torch.testing.assert_close(gradient + through_p, of_port)

    def test_scales_with_each_rows_incoming_gradient(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        weight = torch.linspace(-2, 3, len(query))
        query.requires_grad_()
        loss = co2_loss(query, key, queue, reduction="none", backend=backend)
        (weighted,) = torch.autograd.grad((weight * loss).sum(), query, retain_graph=True)
        (plain,) = torch.autograd.grad(loss.sum(), query)
        torch.testing.assert_close(weighted, weight.unsqueeze(1) * plain)

    def test_survives_a_queue_that_is_overwritten_before_backward(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        query.requires_grad_()
        (expected,) = torch.autograd.grad(co2_loss(query, key, queue, backend=backend), query)
        loss = co2_loss(query, key, queue, backend=backend)
        queue.copy_(rows(*queue.shape, seed=99))
        key.zero_()
        (actual,) = torch.autograd.grad(loss, query)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_in_the_querys_dtype(self, backend: str, dtype: torch.dtype) -> None:
        require(backend, dtype)
        query, key, queue = Case(dtype=dtype).tensors()
        query.requires_grad_()
        loss = co2_loss(query, key, queue, backend=backend)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        loss.backward()
        assert query.grad is not None
        assert query.grad.dtype == dtype

    def test_float16_gradients_survive_a_loss_scale(self, backend: str) -> None:
        """The gradient stays in float32 until it has been scaled, so that a loss scaler can save it."""
        query, key, queue = Case(dtype=torch.float16, queue_scale=1e-4, consistency_weight=0.0).tensors()
        expected = oracle(query, key, queue, consistency_weight=0.0)[1] * 1e-5
        query.requires_grad_()
        loss = info_nce_loss(query, key, queue, backend=backend, reduction="none")
        (scaled,) = torch.autograd.grad((loss * 1e-5).sum() * 65536, query)
        assert distance(scaled.double() / 65536, expected) <= 2e-3 * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("longest", [1.0, 40.0, 3000.0])
    def test_rows_that_are_all_alike(self, backend: str, dtype: torch.dtype, longest: float) -> None:
        """Similarities near 1 have the largest exponentials; those of longer keys no float32 holds."""
        require(backend, dtype)
        common = rows(1, 32, 9, torch.float64)
        query, key, queue = (common + 0.2 * rows(n, 32, n, torch.float64) for n in (8, 9, 300))
        queue = F.normalize(queue, dim=1)
        queue[7] *= longest
        query, key, queue = (x.to(dtype) for x in (query, key[:8], queue))
        settings = {"temperature": 0.07, "consistency_temperature": 0.04, "consistency_weight": 10.0}
        allowed = (1e-6, 1e-5) if dtype == torch.float32 else (1e-3, 2e-2)
        actual = fused(query, key, queue, **settings, backend=backend)
        assert_near(actual, oracle(query, key, queue, **settings), allowed, 1e-6 * longest)

    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_maxima_that_grow_with_every_key(
        self, backend: str, dtype: torch.dtype, consistency_weight: float
    ) -> None:
        """What was added up before is relative to another maximum, and all but the last keys hardly count."""
        require(backend, dtype)
        query, key, queue = Case(batch=5, keys=1000, dim=24, dtype=dtype).tensors()
        queue = queue[(queue.double() @ query[0].double()).argsort()]
        settings = {"temperature": 0.07, "consistency_temperature": 0.04}
        settings["consistency_weight"] = consistency_weight
        allowed = (1e-6, 1e-5) if dtype == torch.float32 else (1e-3, 2e-2)
        actual = fused(query, key, queue, **settings, backend=backend)
        assert_near(actual, oracle(query, key, queue, **settings), allowed)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("longest", "count"), [(8.63, 1), (8.63, 64), (8.75, 16), (6.9, 1), (14.0, 1)])
    def test_keys_whose_exponentials_float32_just_holds(
        self, backend: str, dtype: torch.dtype, longest: float, count: int
    ) -> None:
        """2^124 times d, or eight times 2^127, is more than it holds."""
        require(backend, dtype)
        query, key = (torch.eye(16, dtype=dtype)[i : i + 1] for i in (0, 1))
        queue = torch.zeros(64, 16, dtype=dtype)
        queue[:, 0] = 0.1
        queue[:count, 0] = longest
        settings = {"temperature": 0.1, "consistency_temperature": 0.1, "consistency_weight": 1.0}
        actual = fused(query, key, queue, **settings, backend=backend)
        assert_near(actual, oracle(query, key, queue, **settings), (1e-3, 2e-2), 1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.07, 0.05, 0.04])
    def test_a_positive_that_leaves_the_keys_next_to_nothing(
        self, backend: str, dtype: torch.dtype, temperature: float
    ) -> None:
        """What is left has its direction all the same."""
        require(backend, dtype)
        unit = torch.eye(16, dtype=torch.float64)
        queue = rows(64, 16, 0, torch.float64)
        queue[:, :2] = 0
        query, key = unit[:1] + 0.05 * unit[3:4], unit[:1] + 0.1 * unit[4:5]
        tensors = tuple(x.to(dtype) for x in (query, key, F.normalize(queue, dim=1)))
        settings = {"temperature": temperature, "consistency_temperature": temperature}
        # float16 would not hold smaller gradients.
        settings |= {"consistency_weight": 1e4, "include_positive": True}
        actual = fused(*tensors, **settings, backend=backend)
        assert_near(actual, oracle(*tensors, **settings), (2e-2, 2e-2), 1e-9)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.02, 0.01, 0.005])
    def test_equal_keys_of_the_query_that_are_far_apart_for_the_key(
        self, backend: str, dtype: torch.dtype, temperature: float
    ) -> None:
        """What pulls them apart, Q (d − E[d]), is many times Q."""
        require(backend, dtype)
        query, key = (torch.eye(16, dtype=dtype)[i : i + 1] for i in (0, 1))
        queue = torch.zeros(2, 16, dtype=dtype)
        queue[:, 0], queue[0, 1], queue[1, 1] = 0.7, 0.7, -0.7
        settings = {"temperature": 0.07, "consistency_temperature": temperature, "consistency_weight": 1.0}
        actual = fused(query, key, queue, **settings, backend=backend)
        assert_near(actual, oracle(query, key, queue, **settings), (1e-2, 1e-2))


class TestValue:
    @pytest.mark.parametrize("keys", [1, 7, 4096])
    def test_equal_similarities_give_log_of_k_plus_one(self, backend: str, keys: int) -> None:
        loss = info_nce_loss(torch.ones(2, 4), torch.ones(2, 4), torch.full((keys, 4), 0.5), backend=backend)
        torch.testing.assert_close(loss.item(), math.log(keys + 1), rtol=1e-6, atol=0)

    def test_a_view_is_consistent_with_itself(self, backend: str) -> None:
        query, _, queue = Case(batch=40, keys=300).tensors()
        query.requires_grad_()
        loss = consistency_loss(query, query.detach(), queue, reduction="none", backend=backend)
        loss.sum().backward()
        assert loss.abs().max() <= 1e-7
        assert query.grad is not None
        assert query.grad.abs().max() <= 1e-5

    def test_co2_is_the_weighted_sum_of_its_terms(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        loss, metrics = co2_loss(
            query, key, queue, temperature=0.1, consistency_temperature=0.06, consistency_weight=3.0,
            reduction="none", return_metrics=True, backend=backend,
        )  # fmt: skip
        instance = info_nce_loss(query, key, queue, temperature=0.1, reduction="none", backend=backend)
        consistency = consistency_loss(query, key, queue, temperature=0.06, reduction="none", backend=backend)
        torch.testing.assert_close(metrics.instance_loss, instance)
        torch.testing.assert_close(metrics.consistency_loss, consistency)
        torch.testing.assert_close(loss, instance + 3 * consistency)

    @pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
    @given(case=cases)
    def test_rank_counts_the_more_similar_negatives(
        self, backend: str, case: Case, dtype: torch.dtype, rounding: float
    ) -> None:
        require(backend, dtype)
        query, key, queue = case.replace(dtype=dtype).tensors()
        _, metrics = co2_loss(
            query, key, queue, normalize=case.normalize, return_metrics=True, backend=backend
        )
        query, key, queue = query.double(), key.double(), queue.double()
        if case.normalize:
            query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
        lead = query @ queue.T - (query * key).sum(1, keepdim=True)
        in_doubt = (lead.abs() <= rounding).sum(1)
        assert metrics.positive_rank.dtype == torch.int64
        assert ((metrics.positive_rank - (lead > 0).sum(1)).abs() <= in_doubt).all()

    def test_a_term_of_weight_zero_is_reported_as_zero(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        _, metrics = co2_loss(query, key, queue, consistency_weight=0, return_metrics=True, backend=backend)
        assert not metrics.consistency_loss.any()
        _, metrics = consistency_loss(query, key, queue, return_metrics=True, backend=backend)
        assert not metrics.instance_loss.any()

    def test_metrics_are_detached(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        loss, metrics = co2_loss(query.requires_grad_(), key, queue, return_metrics=True, backend=backend)
        assert loss.requires_grad
        assert not any(metric.requires_grad for metric in metrics)

    def test_reductions(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        loss = {r: co2_loss(query, key, queue, reduction=r, backend=backend) for r in ("mean", "sum", "none")}
        assert loss["none"].shape == (len(query),)
        torch.testing.assert_close(loss["sum"], loss["none"].sum())
        torch.testing.assert_close(loss["mean"], loss["none"].mean())

    @pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
    def test_the_norm_of_a_row_does_not_matter(self, backend: str, scale: float) -> None:
        query, key, queue = Case().tensors()
        expected = co2_loss(query, key, queue, reduction="none", backend=backend)
        if scale < 1e-12:  # below the epsilon a row counts as that much shorter
            expected = oracle(query * scale, key * scale, queue)[0].float()
        actual = co2_loss(query * scale, key * scale, queue, reduction="none", backend=backend)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_vectors(self, backend: str, dtype: torch.dtype) -> None:
        require(backend, dtype)
        query, key, queue = Case(dtype=dtype, dim=8).tensors()
        query[0], key[1], queue[2] = 0, 0, 0
        query.requires_grad_()
        loss = co2_loss(query, key, queue, reduction="none", backend=backend)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert query.grad is not None
        assert torch.isfinite(
            query.grad[1:]
        ).all()  # row 0's is divided by 1e-12: it may leave float16's range
        assert not torch.isnan(query.grad).any()

    def test_nan_in_gives_nan_out(self, backend: str) -> None:
        query, key, queue = Case(batch=40, keys=200).tensors()
        query[3, 1], key[37, 2] = float("nan"), float("nan")
        loss = co2_loss(query, key, queue, reduction="none", backend=backend)
        assert loss.isnan().nonzero().flatten().tolist() == [3, 37]
        queue[150, 0] = float("nan")
        assert co2_loss(query, key, queue, reduction="none", backend=backend).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_huge_finite_similarities_stay_finite(self, backend: str, dtype: torch.dtype) -> None:
        require(backend, dtype)
        query, key, queue = Case(queue_scale=1e30, dtype=dtype).tensors()
        query.requires_grad_()
        loss = co2_loss(query, key, queue, reduction="none", temperature=10.0, backend=backend)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()


class TestPromises:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_two_runs_give_the_same_bits(self, backend: str, dtype: torch.dtype) -> None:
        require(backend, dtype)
        tensors = Case(batch=70, keys=5000, dim=40, dtype=dtype).tensors()
        first, second = (fused(*tensors, backend=backend) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_input_is_left_alone(self, backend: str, layout: str) -> None:
        tensors = Case(layout=layout, queue_layout=layout).tensors()
        copies = [x.clone() for x in tensors]
        versions = [x._version for x in tensors]
        co2_loss(*tensors, backend=backend)
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
        assert [x._version for x in tensors] == versions

    def test_memory_layout_changes_nothing(self, backend: str) -> None:
        query, key, queue = Case(batch=20, keys=300, dim=20).tensors()
        expected = fused(query, key, queue, backend=backend)
        for layout in LAYOUTS:
            actual = fused(*(lay_out(x, layout) for x in (query, key, queue)), backend=backend)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        expanded = queue[:1].expand_as(queue)  # stride 0
        torch.testing.assert_close(
            co2_loss(query, key, expanded, backend=backend),
            co2_loss(query, key, expanded.contiguous(), backend=backend),
        )

    def test_no_grad_and_grad_agree(self, backend: str) -> None:
        query, key, queue = Case().tensors()
        with_gradient = co2_loss(query.requires_grad_(), key, queue, backend=backend)
        with torch.no_grad():
            without = co2_loss(query, key, queue, backend=backend)
        assert not without.requires_grad
        assert torch.equal(with_gradient, without)

    def test_permuting_the_queue_changes_only_rounding(self, backend: str) -> None:
        query, key, queue = Case(keys=500).tensors()
        order = torch.randperm(len(queue), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        for a, b in zip(
            fused(query, key, queue, backend=backend),
            fused(query, key, queue[order], backend=backend),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
