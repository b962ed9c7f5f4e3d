"""The operators on rows of a classifier, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from contrastive_ops import _ops, reference
from contrastive_ops._contract import SGDSettings
from tests.cases import DTYPES, require, rows, sizes

ROWS = 300


def permutation(seed: int, count: int, of: int = ROWS) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(of, generator=generator, device="cpu")[:count]
    return order.to(torch.get_default_device())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
@given(count=sizes, dim=sizes, momentum=st.sampled_from([0.5, 0.9]), decay=st.sampled_from([0.0, 0.01]))
def test_sgd_is_that_of_torch(
    backend: str, dtype: torch.dtype, nesterov: bool, count: int, dim: int, momentum: float, decay: float
) -> None:
    require(backend, dtype, "sgd_")
    weight, buffer, grad = (rows(count, dim, seed, dtype) for seed in range(3))
    expected = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([expected], 0.3, momentum, weight_decay=decay, nesterov=nesterov)
    optimizer.state[expected]["momentum_buffer"] = buffer.clone()
    expected.grad = grad.clone()
    optimizer.step()
    versions = weight._version, buffer._version
    _ops.sgd_(weight, buffer, grad, 0.3, momentum, decay, nesterov, backend)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(weight, expected.detach(), **tolerance)
    torch.testing.assert_close(buffer, optimizer.state[expected]["momentum_buffer"], **tolerance)
    assert weight._version > versions[0]
    assert buffer._version > versions[1]


def test_sgd_without_momentum_remembers_the_last_gradient(backend: str) -> None:
    weight, buffer, grad = (rows(5, 3, seed) for seed in range(3))
    expected = weight - 0.1 * grad
    _ops.sgd_(weight, buffer, grad, 0.1, 0.0, 0.0, False, backend)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(buffer, grad)


def test_sgd_on_other_strides(backend: str) -> None:
    weight, buffer, grad = (rows(6, 10, seed) for seed in range(3))
    plain = [x.clone() for x in (weight, buffer)]
    _ops.sgd_(*plain, grad, 0.1, 0.9, 0.01, False, backend)
    strided = [x.T.contiguous().T for x in (weight, buffer)]
    _ops.sgd_(*strided, grad.T.contiguous().T, 0.1, 0.9, 0.01, False, backend)
    for a, b in zip(strided, plain, strict=True):
        torch.testing.assert_close(a, b)


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.mT.contiguous().mT,
    "every other number": lambda x: x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2].copy_(
        x
    ),
    "reversed dimensions": lambda x: (
        x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])
    ),
}


def spaced(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in a storage of their own."""
    return LAYOUTS[layout](x.clone())


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Half precision is computed in float32 and rounded, wider dtypes are a few roundings off."""
    eps = torch.finfo(actual.dtype).eps * (1 if actual.dtype.itemsize == 2 else 4)
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sgd_in_every_dtype_and_layout(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype | None, layout: str
) -> None:
    if backend == "reference":
        pytest.skip("it is what others are compared with")
    require(backend, dtype, "sgd_")
    weight, buffer, grad = (spaced(rows(37, 65, seed, dtype), layout) for seed in range(3))
    grad = grad.to(grad_dtype or dtype)
    exact_weight, exact_buffer = weight.double().contiguous(), buffer.double().contiguous()
    reference.sgd_(exact_weight, exact_buffer, grad.double(), SGDSettings(0.1, 0.9, 0.01, True))
    _ops.sgd_(weight, buffer, grad, 0.1, 0.9, 0.01, True, backend)
    assert_rounded_once(buffer, exact_buffer)
    assert_rounded_once(weight, exact_weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exchange_in_every_dtype_and_layout(backend: str, dtype: torch.dtype, layout: str) -> None:
    require(backend, dtype, "exchange_rows_")
    dim = 1000 if backend == "triton" else 1100  # the one backend with a limit, of 1024
    weight, buffer = (spaced(rows(9, dim, seed, dtype), layout) for seed in range(2))
    incoming, outgoing = (spaced(rows(10, dim, seed, dtype).view(5, 2, -1), layout) for seed in (2, 3))
    slots, coming, going = permutation(0, 4, 9), permutation(1, 4, 5), permutation(2, 4, 5)
    coefficients = rows(4, 4, 4, torch.float64).view(4, 2, 2)
    wide = [x.double().contiguous() for x in (weight, buffer, incoming, outgoing)]
    reference.exchange_rows_(*wide[:2], slots, wide[2], coming, coefficients, wide[3], going)
    _ops.exchange_rows_(weight, buffer, slots, incoming, coming, coefficients, outgoing, going, backend)
    for actual, exact in zip((weight, buffer), wide[:2], strict=True):
        assert_rounded_once(actual, exact)
    assert torch.equal(outgoing.double(), wide[3])  # which are as they were


class TestExchange:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("one_storage", [False, True])
    @given(count=st.integers(0, 100), dim=sizes, seed=st.integers(0, 100))
    def test_writes_out_and_catches_up(
        self, backend: str, dtype: torch.dtype, one_storage: bool, count: int, dim: int, seed: int
    ) -> None:
        """Slots are written out as they were, and hold C [w; v] of the rows that come; nothing else moves."""
        require(backend, dtype, "exchange_rows_")
        weight, buffer = rows(ROWS, dim, seed, dtype), rows(ROWS, dim, seed + 1, dtype)
        slots, order = permutation(seed, count), permutation(seed + 1, 2 * count)
        incoming = rows(2 * ROWS, dim, seed + 2, dtype).view(ROWS, 2, dim)
        outgoing = incoming if one_storage else torch.full_like(incoming, float("nan"))
        coefficients = rows(count, 4, seed + 3, torch.float64).view(count, 2, 2)
        coming, going = order[:count], order[count:]

        arriving = (coefficients @ incoming[coming].double()).to(dtype)
        expected_outgoing = outgoing.clone()
        expected_outgoing[going] = torch.stack([weight[slots], buffer[slots]], 1)
        expected_weight = weight.index_copy(0, slots, arriving[:, 0])
        expected_buffer = buffer.index_copy(0, slots, arriving[:, 1])
        _ops.exchange_rows_(weight, buffer, slots, incoming, coming, coefficients, outgoing, going, backend)
        # In float64 inside: a float32 row is rounded once.
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
        torch.testing.assert_close(weight, expected_weight, **tolerance)
        torch.testing.assert_close(buffer, expected_buffer, **tolerance)
        torch.testing.assert_close(outgoing, expected_outgoing, rtol=0, atol=0, equal_nan=True)

    def test_the_unit_matrix_moves_rows_as_they_are(self, backend: str) -> None:
        weight, buffer, incoming = rows(4, 8, 0), rows(4, 8, 1), rows(6, 8, 2).view(3, 2, 8)
        slots, every = permutation(0, 3, 4), torch.arange(3)
        unit = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
        _ops.exchange_rows_(
            weight, buffer, slots, incoming, every, unit, torch.empty_like(incoming), every, backend
        )
        assert torch.equal(torch.stack([weight[slots], buffer[slots]], 1), incoming)

    def test_bumps_versions(self, backend: str) -> None:
        weight, buffer, storage = rows(4, 8, 0), rows(4, 8, 1), rows(8, 8, 2).view(4, 2, 8)
        versions = [x._version for x in (weight, buffer, storage)]
        one, two = torch.tensor([1]), torch.tensor([2])
        unit = torch.eye(2, dtype=torch.float64)[None]
        _ops.exchange_rows_(weight, buffer, one, storage, one, unit, storage, two, backend)
        assert all(x._version > v for x, v in zip((weight, buffer, storage), versions, strict=True))

    @pytest.mark.parametrize("wrong", ["slots", "incoming_rows", "outgoing_rows"])
    def test_rows_outside_are_refused_on_a_cpu(self, wrong: str) -> None:
        arguments = {
            "weight": rows(4, 8, 0), "momentum_buffer": rows(4, 8, 1), "slots": torch.tensor([1]),
            "incoming": rows(8, 8, 2).view(4, 2, 8), "incoming_rows": torch.tensor([1]),
            "coefficients": torch.eye(2, dtype=torch.float64)[None],
            "outgoing": rows(8, 8, 3).view(4, 2, 8), "outgoing_rows": torch.tensor([1]), "backend": "cpu",
        } | {wrong: torch.tensor([4])}  # fmt: skip
        with pytest.raises(ValueError, match=rf"{wrong} must be rows of .*, from 0 to 3, got values .* to 4"):
            _ops.exchange_rows_(**arguments)


def test_opcheck(backend: str) -> None:
    weight, buffer, grad = (rows(6, 5, seed) for seed in range(3))
    opcheck(torch.ops.contrastive_ops.sgd_.default, (weight, buffer, grad, 0.1, 0.9, 1e-4, True, backend))
    incoming, outgoing = rows(8, 5, 3).view(4, 2, 5), rows(8, 5, 4).view(4, 2, 5)
    slots, every = torch.tensor([5, 0]), torch.tensor([3, 1])
    coefficients = rows(2, 4, 5, torch.float64).view(2, 2, 2)
    opcheck(
        torch.ops.contrastive_ops.exchange_rows_.default,
        (weight, buffer, slots, incoming, every, coefficients, outgoing, every, backend),
    )
