"""Every wrong argument is refused by name, before anything is computed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import contrastive_ops
from contrastive_ops import co2_loss, consistency_loss, info_nce_loss
from tests.cases import Case

LOSSES = (co2_loss, info_nce_loss, consistency_loss)


def call(loss: Any = co2_loss, **changes: Any) -> Any:
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    return loss(**({"query": query, "key": key, "queue": queue} | changes))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, r"query must be a torch.Tensor, got list"),
        ({"key": None}, TypeError, r"key must be a torch.Tensor, got NoneType"),
        (
            {"query": torch.zeros(4, 3, dtype=torch.int64)},
            TypeError,
            r"query must be of dtype .*got torch.int64",
        ),
        (
            {"queue": torch.zeros(6, 3, dtype=torch.complex64)},
            TypeError,
            r"queue must be of dtype .*complex64",
        ),
        ({"queue": torch.zeros(6, 3).to_sparse()}, TypeError, r"queue must be a dense tensor"),
        ({"query": torch.zeros(3)}, ValueError, r"query must have 2 dimensions .*got shape \(3,\)"),
        ({"key": torch.zeros(4, 1, 3)}, ValueError, r"key must have 2 dimensions .*\(4, 1, 3\)"),
        ({"query": torch.zeros(0, 3)}, ValueError, r"query must not be empty, got shape \(0, 3\)"),
        ({"queue": torch.zeros(0, 3)}, ValueError, r"queue must not be empty, got shape \(0, 3\)"),
        ({"query": torch.zeros(4, 0)}, ValueError, r"query must not be empty"),
        ({"key": torch.zeros(5, 3)}, ValueError, r"key must have the shape of query, \(4, 3\), got \(5, 3\)"),
        ({"queue": torch.zeros(6, 2)}, ValueError, r"queue must be \(K, D\) with D = 3 .*got \(6, 2\)"),
        ({"queue": torch.zeros(3, 6)}, ValueError, r"pass queue.T"),
        ({"key": torch.zeros(4, 3).double()}, TypeError, r"key must have the dtype of query, torch.float32"),
        (
            {"queue": torch.zeros(6, 3, device="meta")},
            ValueError,
            r"queue must be on the device of query, cpu",
        ),
        (
            {"key": torch.zeros(4, 3, requires_grad=True)},
            ValueError,
            r"key gets no gradient .*key.detach\(\)",
        ),
        ({"queue": torch.zeros(6, 3, requires_grad=True)}, ValueError, r"queue gets no gradient"),
        ({"temperature": 0}, ValueError, r"temperature must be finite and > 0, got 0"),
        ({"temperature": -0.1}, ValueError, r"temperature must be finite and > 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, r"temperature must be finite and > 0, got nan"),
        ({"temperature": float("inf")}, ValueError, r"temperature must be finite and > 0, got inf"),
        ({"temperature": "0.1"}, TypeError, r"temperature must be a number, got str"),
        ({"temperature": torch.tensor(0.1)}, TypeError, r"temperature must be a number, got Tensor"),
        ({"temperature": True}, TypeError, r"temperature must be a number, got bool"),
        ({"normalize": 1}, TypeError, r"normalize must be True or False, got 1"),
        ({"return_metrics": None}, TypeError, r"return_metrics must be True or False, got None"),
        ({"reduction": "average"}, ValueError, r"reduction must be 'mean', 'sum' or 'none', got 'average'"),
        (
            {"backend": "gpu"},
            ValueError,
            r"unknown backend 'gpu', expected one of reference, cpu, triton, cuda",
        ),
    ],
)
def test_bad_argument(loss: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(loss, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"consistency_temperature": 0},
            ValueError,
            r"consistency_temperature must be finite and > 0, got 0",
        ),
        ({"consistency_weight": -1}, ValueError, r"consistency_weight must be finite and >= 0, got -1"),
        (
            {"consistency_weight": float("nan")},
            ValueError,
            r"consistency_weight must be finite and >= 0, got nan",
        ),
        ({"consistency_weight": None}, TypeError, r"consistency_weight must be a number, got NoneType"),
        ({"include_positive": "yes"}, TypeError, r"include_positive must be True or False, got 'yes'"),
    ],
)
def test_bad_argument_of_co2(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_a_key_that_requires_grad_is_fine_where_none_is_recorded() -> None:
    with torch.no_grad():
        call(key=torch.zeros(4, 3, requires_grad=True))


def test_integers_are_numbers() -> None:
    assert torch.equal(
        call(temperature=1, consistency_weight=2), call(temperature=1.0, consistency_weight=2.0)
    )


@pytest.mark.parametrize("name", ["CO2Loss", "InfoNCELoss", "ConsistencyLoss"])
def test_modules_compute_their_function(name: str) -> None:
    function = {"CO2Loss": co2_loss, "InfoNCELoss": info_nce_loss, "ConsistencyLoss": consistency_loss}[name]
    module_class = getattr(contrastive_ops, name)
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    assert torch.equal(module_class()(query, key, queue), function(query, key, queue))
    settings = {"temperature": 0.3, "reduction": "sum", "normalize": False}
    module = module_class(**settings)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(query, key, queue), function(query, key, queue, **settings))
    assert "temperature=0.3" in repr(module)
    with_metrics = module_class(return_metrics=True)(query, key, queue)
    assert torch.equal(with_metrics[1].positive_rank, function(query, key, queue, return_metrics=True)[1][2])
    module.temperature = 0.7  # settings are plain attributes: schedules may change them
    assert torch.equal(
        module(query, key, queue), function(query, key, queue, **settings | {"temperature": 0.7})
    )


def test_modules_refuse_unknown_settings() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        contrastive_ops.CO2Loss(temprature=0.1)


def test_modules_compile() -> None:
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    module = contrastive_ops.CO2Loss()
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True)(query, key, queue), module(query, key, queue)
    )
