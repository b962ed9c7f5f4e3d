"""A call is taken for one of a kind that was seen before only where nothing that matters is another.

What is known of kinds decides as what looks at every call does, whatever came before: the tests compare the
two on calls that differ in little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from contrastive_ops import _calls, _ops, functional
from contrastive_ops._calls import Known, extension, once_a_kind, signature, signature_unobserved
from contrastive_ops._checks import Checks
from contrastive_ops._contract import CO2Settings

pytestmark = pytest.mark.skipif(extension is None, reason="no extension was built for this torch")


def beyond_its_storage(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 4)
    return x


NUMBERS = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
# One tensor with what an operator's checks or a kernel may take for another.
TENSORS: dict[str, Tensor] = {
    "plain": NUMBERS[0],
    "of other sizes": NUMBERS[0, :2],
    "of more dimensions": NUMBERS[0][None],
    "empty": NUMBERS[0, :0],
    "transposed": NUMBERS[0].T.contiguous().T,
    "spaced": torch.stack([NUMBERS[0]] * 2, 1)[:, 0],
    "elsewhere in a row of 16 bytes": torch.empty(65)[1:].view(4, 16).copy_(NUMBERS[0]),
    "float64": NUMBERS[0].double(),
    "bfloat16": NUMBERS[0].bfloat16(),
    "int32": NUMBERS[0].int(),
    "with a gradient": NUMBERS[0].clone().requires_grad_(),
    "beyond its storage": beyond_its_storage(NUMBERS[0]),
}
SETTINGS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    float("nan"),
    1,
    2,
    True,
    False,
    None,
    "1",
    "mean",
    (),
    (1.0,),
    ((1.0,), 1.0),
)


def test_what_matters_makes_another_kind() -> None:
    calls = [(x,) for x in (*TENSORS.values(), *SETTINGS)] + [
        ("me", "an"),
        ("1", 1.0),
        (1.0, "1"),
        (),
        ((), ()),
    ]
    kinds = [signature(call) for call in calls]
    assert None not in kinds
    assert len(set(kinds)) == len(calls)
    with torch.no_grad():
        assert signature(calls[0]) not in kinds
    with torch.autocast("cpu"):
        assert signature(calls[0]) not in kinds


@pytest.mark.parametrize(
    "name", [name for name in TENSORS if name not in ("beyond its storage", "elsewhere in a row of 16 bytes")]
)
def test_other_numbers_and_another_place_are_of_one_kind(name: str) -> None:
    tensor = TENSORS[name].detach()
    room = tensor.new_empty(1024)
    same = room.as_strided(tensor.shape, tensor.stride(), 512)
    assert (
        signature((tensor, 0.5))
        == signature((same, 0.5))
        == signature((torch.nn.Parameter(same, False), 0.5))
    )


class Rows(Tensor):
    pass


OF_NO_KIND: dict[str, Any] = {
    "of a class of its own": NUMBERS.as_subclass(Rows),  # type: ignore[arg-type]
    "sparse": NUMBERS.to_sparse(),
    "meta": NUMBERS.to("meta"),
    "negated": torch._neg_view(NUMBERS),
    "conjugated": torch.view_as_complex(NUMBERS.view(2, 4, 8, 2)).conj(),
    "fake": FakeTensorMode().from_tensor(NUMBERS),
    "in a tuple": (NUMBERS,),  # whose place in memory would be forgotten
    "numpy's float32": np.float32(0.5),
    "numpy's float64": np.float64(0.5),
    "numpy's int64": np.int64(1),
    "more than 64 bits": 1 << 64,
    "a list": [1.0],
    "no text": "\ud800",
    "a dtype": torch.float32,
    "an object": object(),
}


@pytest.mark.parametrize("name", OF_NO_KIND)
def test_what_may_be_more_than_it_seems_is_of_no_kind(name: str) -> None:
    assert signature((NUMBERS, OF_NO_KIND[name])) is None
    with torch.inference_mode():
        assert signature((NUMBERS.clone(),)) is None


def observed() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Ways to call a function in which PyTorch sees the operators that it calls."""
    contexts = [
        torch.inference_mode, torch._C._AutoDispatchBelowAutograd, torch.autograd.profiler.profile,
        torch.profiler.profile, lambda: torch.device("cpu"), lambda: FlopCounterMode(display=False),
        FakeTensorMode, torch.autograd.forward_ad.dual_level,
    ]  # fmt: skip
    for context in contexts:

        def within(function: Callable[[], Any], context: Callable[[], Any] = context) -> None:
            with context():
                function()

        yield within
    x = torch.ones(2)

    def returning(function: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: (function(), (2 * x).sum())[1]

    yield lambda function: torch.func.vmap(returning(function))(x)
    yield lambda function: torch.func.grad(returning(function))(x)
    yield lambda function: torch.jit.trace(returning(function), x, check_trace=False)
    yield lambda function: make_fx(returning(function))(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("way", list(observed()))
def test_a_call_that_is_observed_is_of_no_kind(way: Callable[[Callable[[], Any]], Any]) -> None:
    kinds = []
    way(lambda: kinds.append(signature_unobserved((NUMBERS, 0.5))))
    assert kinds == [None]
    assert signature_unobserved((NUMBERS, 0.5)) is not None


def test_kinds_are_forgotten_before_there_are_too_many() -> None:
    known: Known[int] = Known()
    for i in range(2 * _calls._MOST_KINDS + 1):
        assert known.remember(i, i) == known[i] == i
        assert len(known) <= _calls._MOST_KINDS


def test_is_run_once_a_kind_and_again_where_it_raised() -> None:
    calls = []

    @once_a_kind
    def function(x: Tensor, number: float) -> str:
        calls.append(number)
        if number < 0:
            raise ValueError
        return f"{number}"

    for _ in range(3):
        assert function(NUMBERS, 1.0) == "1.0"
        assert function(NUMBERS, 1) == "1"
        with pytest.raises(ValueError):  # noqa: PT011
            function(NUMBERS, -1.0)
    assert sorted(calls) == [-1.0, -1.0, -1.0, 1, 1]


# What is checked of losses, and what is near to arguments that are right

RIGHT = NUMBERS[0]
VIEWS, OWN = NUMBERS, torch.arange(4)
FLAGS = (True, False, 1, None)
TEMPERATURES = (0.2, 1, 0.0, -0.2, float("nan"), True, "0.2", None, np.float32(0.2))
COMMON = (("mean", "none", "average", None), FLAGS, (None, "cpu", "gpu", 1))
TENSORS_AND_MORE = (*TENSORS.values(), None, RIGHT.to("meta"))
CHECKS: dict[str, tuple[Any, tuple[tuple[Any, ...], ...]]] = {
    "queue": (
        functional._check_queue_loss,
        (
            *[TENSORS_AND_MORE] * 3, TEMPERATURES, TEMPERATURES, (1.0,), TEMPERATURES, FLAGS, FLAGS,
            *COMMON[:2], (None, "group"), COMMON[2], ("consistency_temperature",),
        ),
    ),
    "nt_xent": (
        functional._check_nt_xent,
        (
            *[TENSORS_AND_MORE] * 2, *[TEMPERATURES] * 3, FLAGS, *COMMON[:2], (None, "group"), COMMON[2],
        ),
    ),
    "conic": (
        functional._check_conic,
        (
            (VIEWS, VIEWS.double(), VIEWS.detach().requires_grad_(), *TENSORS_AND_MORE), TENSORS_AND_MORE,
            (OWN, OWN[:2], OWN.int(), OWN.float(), None),
            (None, 4, 100, 3, True, 1 << 63, 2.5, np.int64(100)),
            *[TEMPERATURES] * 2, *COMMON[:2], (None, "update"), (None, "group"), COMMON[2],
        ),
    ),
}  # fmt: skip


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a function returns, or how it refuses."""
    try:
        return function(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


def few_changes(data: st.DataObject, choices: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    """Arguments of which the first choices are right, all but two or fewer of them as they are."""
    arguments = [first for first, *_ in choices]
    for place in data.draw(st.lists(st.integers(0, len(choices) - 1), max_size=2)):
        arguments[place] = data.draw(st.sampled_from(choices[place]))
    return tuple(arguments)


@pytest.mark.parametrize("name", CHECKS)
@given(data=st.data())
def test_losses_are_checked_as_if_all_were_looked_at(name: str, data: st.DataObject) -> None:
    check, choices = CHECKS[name]
    for _ in range(4):
        right = tuple(first for first, *_ in choices)
        assert outcome(check, right) == outcome(check.__wrapped__, right)
        arguments = few_changes(data, choices)
        for context in (torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu")):
            with context():
                assert repr(outcome(check, arguments)) == repr(outcome(check.__wrapped__, arguments))


def test_each_wrong_argument_of_a_loss_is_refused_after_a_right_call() -> None:
    for check, choices in CHECKS.values():
        right = [first for first, *_ in choices]
        for (place, others), _ in itertools.product(enumerate(choices), range(2)):
            for other in others:
                check(*right)
                arguments = (*right[:place], other, *right[place + 1 :])
                assert repr(outcome(check, arguments)) == repr(outcome(check.__wrapped__, arguments))


CO2 = CO2Settings(0.2, 0.05, 1.0, 0.3, False, True)
NOT_PLAIN = (None, RIGHT.to("meta"), RIGHT.to_sparse(), RIGHT.as_subclass(Rows))  # type: ignore[arg-type]


@given(data=st.data())
def test_an_operator_checks_as_if_all_were_looked_at(data: st.DataObject) -> None:
    schema = torch.ops.contrastive_ops.co2.default._schema
    known = Checks("co2", schema)
    for _ in range(6):
        arguments = few_changes(
            data, ((*TENSORS.values(), *NOT_PLAIN),) * 3 + tuple((x, 0.0, -1.0) for x in CO2[:4])
        )
        arguments += (*CO2[4:], True, None)
        assert outcome(known, (arguments,)) == outcome(Checks("co2", schema), (arguments,))


def test_an_operator_with_a_mistake_is_refused_after_a_right_call() -> None:
    """By the way that a loss takes."""
    right = (RIGHT, RIGHT, RIGHT, *CO2, False, "reference")
    mistakes = [
        (0, TENSORS["int32"]), (1, TENSORS["of other sizes"]), (2, TENSORS["beyond its storage"]),
        (2, TENSORS["empty"]), (3, -0.2), (10, "gpu"),
    ]  # fmt: skip
    for place, wrong in mistakes:
        for _ in range(2):
            _ops.co2(*right)
        with pytest.raises((TypeError, ValueError)):
            _ops.co2(*right[:place], wrong, *right[place + 1 :])


def test_an_operator_takes_integers_for_numbers() -> None:
    """As PyTorch's dispatcher does, which makes floats of them."""
    expected = _ops.co2(RIGHT, RIGHT, RIGHT, *CO2._replace(temperature=1.0), False, "reference")
    for _ in range(3):
        actual = _ops.co2(RIGHT, RIGHT, RIGHT, *CO2._replace(temperature=1), False, "reference")
        assert all(map(torch.equal, actual, expected))
