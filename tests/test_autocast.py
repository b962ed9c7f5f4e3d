"""Under autocast tensors of several dtypes meet in a loss: they are taken, and multiplied in the query's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops import CO2Loss, co2_loss, conic_loss, consistency_loss, info_nce_loss, nt_xent_loss
from tests.cases import INTERPRETED, Case, NTXentCase, require
from tests.oracles import distance, fused, loss_and_gradient, oracle
from train_ref.eager import eager_co2

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
MIXED = [(query, key) for query in DTYPES for key in DTYPES if query != key]
QUEUE_LOSSES: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "co2": (co2_loss, {}),
    "info_nce": (info_nce_loss, {"consistency_weight": 0.0}),
    "consistency": (
        consistency_loss,
        {"instance_weight": 0.0, "consistency_weight": 1.0, "consistency_temperature": 0.05},
    ),
}


def autocast(dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast(torch.get_default_device().type, dtype)


class TestMixedDtypes:
    @pytest.mark.parametrize(("query_dtype", "key_dtype"), MIXED)
    @pytest.mark.parametrize("name", QUEUE_LOSSES)
    def test_a_key_is_taken_as_it_is(
        self, backend: str, name: str, query_dtype: torch.dtype, key_dtype: torch.dtype
    ) -> None:
        """No further from float64 than eager PyTorch is under autocast; a key's digits are not lost."""
        require(backend, query_dtype)
        loss, settings = QUEUE_LOSSES[name]
        query, key, queue = Case(batch=24, keys=130, dim=24, dtype=torch.float64).tensors()
        query, key, queue = query.to(query_dtype), key.to(key_dtype), queue.float()
        expected, expected_gradient = oracle(query, key, queue, **settings)
        half = query_dtype if query_dtype in HALF else torch.bfloat16
        with autocast(half):
            actual, gradient = loss_and_gradient(partial(loss, backend=backend), query, key, queue)
            eager, eager_gradient = loss_and_gradient(
                eager_co2, query.double().float(), key.float(), queue, **settings
            )
        rounding = torch.finfo(half).eps
        assert distance(actual, expected) <= distance(eager, expected) + rounding * expected.norm()
        allowed = distance(eager_gradient, expected_gradient) + rounding * expected_gradient.norm()
        assert distance(gradient, expected_gradient) <= allowed

    @pytest.mark.parametrize(("query_dtype", "key_dtype"), MIXED)
    def test_loss_and_gradient_have_the_dtypes_that_the_query_gives_them(
        self, backend: str, query_dtype: torch.dtype, key_dtype: torch.dtype
    ) -> None:
        require(backend, query_dtype)
        query, key, queue = Case(dtype=query_dtype).tensors()
        query.requires_grad_()
        with autocast():
            loss = co2_loss(query, key.to(key_dtype), queue, backend=backend)
        loss.backward()
        assert loss.dtype == (torch.float64 if query_dtype == torch.float64 else torch.float32)
        assert query.grad is not None
        assert query.grad.dtype == query_dtype

    @pytest.mark.parametrize(("first", "second"), MIXED)
    def test_views_of_nt_xent_are_computed_in_the_wider_dtype(
        self, backend: str, first: torch.dtype, second: torch.dtype
    ) -> None:
        wider = torch.promote_types(first, second)
        require(backend, wider)
        view1, view2 = NTXentCase(dim=24, dtype=torch.float64).tensors()
        view1, view2 = view1.to(first).requires_grad_(), view2.to(second).requires_grad_()
        with autocast():
            loss = nt_xent_loss(view1, view2, reduction="none", backend=backend)
        gradients = torch.autograd.grad(loss.sum(), (view1, view2))
        of_wider = [view.detach().to(wider).requires_grad_() for view in (view1, view2)]
        expected = nt_xent_loss(*of_wider, reduction="none", backend=backend)
        assert torch.equal(loss, expected)
        for gradient, wide, dtype in zip(
            gradients, torch.autograd.grad(expected.sum(), of_wider), (first, second), strict=True
        ):
            assert gradient.dtype == dtype
            assert torch.equal(gradient, wide.to(dtype))

    @pytest.mark.parametrize("loss", [co2_loss, info_nce_loss, consistency_loss, CO2Loss()])
    def test_outside_the_error_says_what_to_do(self, loss: Callable[..., Tensor]) -> None:
        query, key, queue = Case(dtype=torch.bfloat16).tensors()
        with pytest.raises(
            TypeError, match=r"key must have the dtype of query.*pass key\.to\(query\.dtype\)"
        ):
            loss(query, key.float(), queue)
        loss(query, key.float().to(query.dtype), queue)
        with autocast(), torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="autocast"):
            loss(query, key.float(), queue)

    def test_outside_the_error_says_what_to_do_with_views(self) -> None:
        view1, view2 = NTXentCase().tensors()
        with pytest.raises(TypeError, match=r"view2 must have the dtype.*pass view2\.to\(view1\.dtype\)"):
            nt_xent_loss(view1, view2.half())

    def test_compiles(self) -> None:
        query, key, queue = Case(dtype=torch.bfloat16).tensors()
        key = key.float()

        def step(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return co2_loss(query, key, queue)

        compiled = torch.compile(step, fullgraph=True)
        torch.testing.assert_close(compiled(query, key, queue), step(query, key, queue))
        views = NTXentCase(dtype=torch.bfloat16).tensors()[0], NTXentCase().tensors()[1]
        compiled = torch.compile(nt_xent_loss, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(*views), nt_xent_loss(*views))

    def test_a_training_step_as_people_write_it(self, backend: str) -> None:
        """Keys normalised by PyTorch, which may widen them, and a queue in float32."""
        encoder = torch.nn.Linear(16, 16)
        _, images, queue = Case(batch=24, keys=130).tensors()
        with autocast(torch.float16):
            query = encoder(images)
            for key in (F.normalize(query.detach(), dim=1), F.normalize(query.detach().float(), dim=1)):
                loss = co2_loss(query, key, queue, backend=backend)
                (gradient,) = torch.autograd.grad(loss, encoder.weight, retain_graph=True)
                assert torch.isfinite(gradient).all()


class TestHalfPrecisionQueries:
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("queue_dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("dim", [24, 300])
    def test_a_wider_queue_is_multiplied_in_half_precision(
        self, dtype: torch.dtype, queue_dtype: torch.dtype, dim: int
    ) -> None:
        """Rounded on the way to the products, as a queue in the query's dtype is when it is stored."""
        backend = "triton"  # on CPUs it depends on what the processor multiplies
        if not INTERPRETED and not torch.cuda.is_available():
            pytest.skip("nothing multiplies in half precision here for sure")
        require(backend, dtype)
        query, key, queue = Case(batch=24, keys=130, dim=dim, dtype=dtype, queue_dtype=queue_dtype).tensors()
        stored = fused(query, key, queue.to(dtype), backend=backend)
        loaded = fused(query, key, queue, backend=backend)
        assert all(torch.equal(a, e) for a, e in zip(loaded, stored, strict=True))

    @pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1e-6, 1e3, 1e30])
    @pytest.mark.parametrize("dtype", HALF)
    def test_a_queue_beyond_half_precision_s_range_stays_finite(
        self, backend: str, dtype: torch.dtype, queue_dtype: torch.dtype, scale: float
    ) -> None:
        require(backend, dtype)
        query, key, queue = Case(dtype=dtype, queue_dtype=queue_dtype, queue_scale=scale).tensors()
        query.requires_grad_()
        actual = co2_loss(query, key, queue, backend=backend, temperature=10.0, reduction="none")
        actual.sum().backward()
        assert torch.isfinite(actual).all()
        assert query.grad is not None
        assert not query.grad.isnan().any()
        queue[3, 2] = float("nan")
        assert co2_loss(query, key, queue, backend=backend, reduction="none").isnan().all()
        queue[3, 2] = float("inf")
        assert co2_loss(query, key, queue, backend=backend, reduction="none").isnan().all()

    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e30])
    @pytest.mark.parametrize("dtype", HALF)
    def test_the_norm_of_a_wider_key_does_not_matter(
        self, backend: str, dtype: torch.dtype, scale: float
    ) -> None:
        require(backend, dtype)
        query, key, queue = Case(batch=24, keys=130, dim=24).tensors()
        query, queue = query.to(dtype), queue.to(dtype)
        with autocast(dtype):
            expected, actual = (
                loss_and_gradient(partial(co2_loss, backend=backend), query, k, queue)
                for k in (key, scale * key)
            )
        for a, e in zip(actual, expected, strict=True):
            assert distance(a, e) <= torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", HALF)
def test_autocast_changes_no_digit(backend: str, dtype: torch.dtype, half: torch.dtype) -> None:
    """What a loss computes in, its tensors say: a float32 query stays float32, and none is refused."""
    require(backend, dtype)
    query, key, queue = Case(batch=24, keys=130, dim=24, dtype=dtype).tensors()
    views, target = torch.stack([query, key]), torch.arange(24)
    calls: list[Callable[[], Tensor]] = [
        lambda: co2_loss(query, key, queue, backend=backend),
        lambda: nt_xent_loss(query, key, consistency_weight=1.0, backend=backend),
        lambda: conic_loss(views, queue, target, backend=backend),
    ]
    for call in calls:
        expected = call()
        with autocast(half):
            assert torch.equal(call(), expected)
