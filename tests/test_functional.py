"""Every wrong argument is refused by name, before anything is computed."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import shutil
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import contrastive_ops
from contrastive_ops import co2_loss, consistency_loss, info_nce_loss
from tests.cases import Case

LOSSES = (co2_loss, info_nce_loss, consistency_loss)
compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler for CPUs"
)


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


class TestTransposedQueue:
    """Where D = K only the numbers tell a queue from MoCo's (D, K) buffer."""

    @staticmethod
    def square(dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Case(batch=4, keys=dim, dim=dim, dtype=dtype).tensors()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [16, 128, 1024])
    @pytest.mark.parametrize("loss", [*LOSSES, contrastive_ops.CO2Loss()])
    def test_warns(self, loss: Any, dim: int, dtype: torch.dtype) -> None:
        query, key, queue = self.square(dim, dtype)
        for transposed in (queue.T, queue.T.contiguous()):
            with pytest.warns(UserWarning, match=r"columns are unit vectors.*passed as queue\.T"):
                loss(query, key, transposed)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_is_silent_otherwise(self, dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
        for dim in (1, 2, 16, 128):
            query, key, queue = self.square(dim, dtype)
            for upright in (queue, queue.T.contiguous().T, 3 * queue.T, 0 * queue, torch.eye(dim).to(dtype)):
                co2_loss(query, key, upright)
        co2_loss(query, key, queue.T[:64])  # not square
        assert not recwarn

    @compiles
    def test_looks_at_nothing_that_is_traced(self, recwarn: pytest.WarningsRecorder) -> None:
        query, key, queue = self.square(16, torch.float32)
        torch.compile(co2_loss, fullgraph=True)(query, key, queue.T)
        torch.func.vmap(co2_loss)(query[None], key[None], queue.T[None])
        make_fx(lambda *tensors: co2_loss(*tensors))(query, key, queue.T)
        mode = FakeTensorMode()
        fake = [mode.from_tensor(x) for x in (query, key, queue.T)]
        with mode:
            co2_loss(*fake)
        assert not [warning for warning in recwarn if "unit vectors" in str(warning.message)]

    def test_is_told_once_a_place(self) -> None:
        query, key, queue = self.square(16, torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                co2_loss(query, key, queue.T)
        assert [warning.filename for warning in caught] == [__file__]


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


MODULES = ["CO2Loss", "InfoNCELoss", "ConsistencyLoss", "NTXentLoss", "ConICLoss"]


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_how_their_settings_are_given(name: str) -> None:
    module = getattr(contrastive_ops, name)
    first, second, *_ = inspect.signature(module).parameters
    for positional in ((0.1,), (0.1, 7), (0.1, *range(20))):
        with pytest.raises(
            TypeError, match=rf"^{name} takes its settings by keyword: {first}=0\.1"
        ) as raised:
            module(*positional)
        assert (f"{second}=7" in str(raised.value)) == (positional == (0.1, 7))
    with pytest.raises(TypeError, match="by keyword"):
        module(0.1, reduction="sum")


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_settings_and_defaults_of_their_function(name: str) -> None:
    module = getattr(contrastive_ops, name)
    settings = [
        parameter
        for parameter in inspect.signature(module._loss).parameters.values()
        # A step is taken once: it is an argument of a call.
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "update"
    ]
    assert list(inspect.signature(module).parameters.values()) == settings


def test_a_subclass_has_an_init_of_its_own() -> None:
    class Scheduled(contrastive_ops.CO2Loss):
        def __init__(self, steps: int) -> None:
            super().__init__(temperature=0.5)
            self.steps = steps

    module = Scheduled(3)
    assert (module.steps, module.temperature) == (3, 0.5)
    assert "steps" not in module.settings()
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    assert torch.equal(module(query, key, queue), co2_loss(query, key, queue, temperature=0.5))


@pytest.mark.parametrize("name", MODULES)
def test_modules_list_what_settings_there_are(name: str) -> None:
    module = getattr(contrastive_ops, name)
    known = ", ".join(inspect.signature(module).parameters)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected.*'tau'; there are {known}$"):
        module(tau=0.1)


@compiles
def test_modules_compile() -> None:
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    module = contrastive_ops.CO2Loss()
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True)(query, key, queue), module(query, key, queue)
    )
