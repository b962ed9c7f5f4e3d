"""lightly's losses by the fused ones: against the formulas, and against lightly where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_ops.adapters.lightly import CO2Regularizer, NTXentLoss
from tests.adapters import formulas
from tests.adapters.formulas import features, gradients

# What rounding in float64 leaves of sums of this size.
EXACT: Any = {"rtol": 1e-11, "atol": 1e-13}
STEPS, DIM = 7, 12  # banks in float64 are as exact as what they are compared with
# Rows of the bank and of the batch: it divides, it does not, one row each step, more than the bank has.
SIZES = [(12, 4), (12, 5), (3, 1), (7, 9), (1, 3)]


def test_a_batch_is_nt_xent() -> None:
    out0, out1 = features(2, 9, DIM)
    ours, theirs = NTXentLoss(temperature=0.3)(out0, out1), formulas.nt_xent(out0, out1, 0.3)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, out0, out1), gradients(theirs, out0, out1), **EXACT)


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_a_bank_is_a_queue_that_drops_what_does_not_fit(size: int, batch: int) -> None:
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(size, DIM)).double()
    bank, pointer = criterion.memory_bank.bank.clone(), 0
    for step in range(STEPS):
        out0, out1 = features(2, batch, DIM, seed=step)
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        theirs = formulas.info_nce(query, key, bank, 0.2)
        ours = criterion(out0, out1)
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(gradients(ours, out0, out1), gradients(theirs, out0, out1), **EXACT)

        bank = bank.clone()
        bank[pointer : pointer + batch] = key.detach()[: size - pointer]
        pointer = 0 if pointer + batch >= size else pointer + batch
        assert torch.equal(criterion.memory_bank.bank, bank)
        assert criterion.memory_bank.bank_ptr.tolist() == [pointer]


def test_a_key_without_a_gradient_changes_no_value() -> None:
    out0, out1 = features(2, 4, DIM)
    criterion = NTXentLoss(memory_bank_size=(8, DIM)).double()
    first = criterion.memory_bank.bank.clone()
    with_gradient = criterion(out0, out1)
    criterion.memory_bank.bank.copy_(first)
    torch.testing.assert_close(criterion(out0, out1.detach()), with_gradient, **EXACT)


def test_evaluation_leaves_the_bank() -> None:
    out0, out1 = features(2, 4, DIM, dtype=torch.float32)
    criterion = NTXentLoss(memory_bank_size=(8, DIM))
    before = criterion.memory_bank.bank.clone()
    assert not criterion(out0.detach(), out1).isnan()
    assert torch.equal(criterion.memory_bank.bank, before)
    assert criterion.memory_bank.bank_ptr.tolist() == [0]


@pytest.mark.parametrize("size", [0, (10, DIM)])
def test_the_regularizer_trains_the_query_alone(size: Any) -> None:
    out0, out1 = features(2, 6, DIM)
    co2 = CO2Regularizer(alpha=0.7, t_consistency=0.1, memory_bank_size=size).double()
    bank = co2.memory_bank.bank.clone() if size else None
    ours, theirs = co2(out0, out1), 0.7 * formulas.co2(out0, out1, bank, 0.1)
    torch.testing.assert_close(ours, theirs, **EXACT)
    of_query, of_key = gradients(ours, out0, out1)
    torch.testing.assert_close(of_query, gradients(theirs, out0)[0], **EXACT)
    assert of_query.norm() > 1e-3
    assert of_key is None


def test_the_regularizer_always_fills_its_bank() -> None:
    out0, out1 = features(2, 4, DIM, dtype=torch.float32)
    co2 = CO2Regularizer(memory_bank_size=(8, DIM))
    co2(out0.detach(), out1)
    torch.testing.assert_close(co2.memory_bank.bank[:4], F.normalize(out1.detach(), dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0, (64, DIM)])
def test_half_precision_comes_near(dtype: torch.dtype, size: Any) -> None:
    out0, out1 = features(2, 16, DIM, dtype=dtype)
    criterion, co2 = NTXentLoss(memory_bank_size=size), CO2Regularizer(memory_bank_size=size)
    for loss in (criterion, co2):
        bank = loss.memory_bank.bank.double() if size else None
        value = loss(out0, out1)
        assert value.dtype == torch.float32
        query, key = (F.normalize(x.detach().double(), dim=1) for x in (out0, out1))
        if loss is co2:
            exact = formulas.co2(query, key, bank, 0.05)
        elif bank is not None:
            exact = formulas.info_nce(query, key, bank, 0.5)
        else:
            exact = formulas.nt_xent(query, key, 0.5)
        # The similarities' rounding, divided by the temperature: bfloat16 has 8 bits.
        torch.testing.assert_close(value.double(), exact, rtol=0.03, atol=0)
        assert gradients(value, out0)[0].isfinite().all()


def test_the_dimension_may_come_with_the_first_batch() -> None:
    with pytest.warns(UserWarning, match="'size=6' does not specify feature dimension"):
        criterion = NTXentLoss(memory_bank_size=6)
    assert criterion.memory_bank.bank.shape == (6,)
    criterion(*features(2, 4, DIM, dtype=torch.float32))
    assert criterion.memory_bank.bank.shape == (6, DIM)


def test_states_are_empty_as_lightlys_are() -> None:
    model = nn.ModuleDict({"loss": NTXentLoss(memory_bank_size=(8, DIM)), "co2": CO2Regularizer()})
    assert not model.state_dict()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: NTXentLoss(temperature=0.0), "temperature must be finite and > 0, got 0.0"),
        (lambda: NTXentLoss(temperature=-1.0), "temperature must be finite and > 0, got -1.0"),
        (lambda: CO2Regularizer(t_consistency=0.0), "t_consistency must be finite and > 0"),
        (lambda: NTXentLoss(memory_bank_size=-1), "Illegal memory bank size -1"),
        (lambda: CO2Regularizer(memory_bank_size=(8, -1)), r"Illegal memory bank size \(8, -1\)"),
    ],
)
def test_wrong_settings_are_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


class Pair:
    """Ours and lightly's, with equal banks."""

    def __init__(self, name: str, **settings: Any) -> None:
        loss = pytest.importorskip("lightly.loss")
        regularizer = pytest.importorskip("lightly.loss.regularizer")
        theirs = {"NTXentLoss": loss.NTXentLoss, "CO2Regularizer": regularizer.CO2Regularizer}
        ours = {"NTXentLoss": NTXentLoss, "CO2Regularizer": CO2Regularizer}
        self.ours, self.theirs = (self._made(each[name], settings) for each in (ours, theirs))

    @staticmethod
    def _made(loss: Any, settings: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        return loss(**settings).double()

    def __call__(self, *out: Tensor) -> tuple[Tensor, Tensor]:
        return self.ours(*out), self.theirs(*out)

    def assert_equal_banks(self) -> None:
        for name in ("bank", "bank_ptr"):
            ours, theirs = (getattr(each.memory_bank, name) for each in (self.ours, self.theirs))
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(("size", "batch"), SIZES)
@pytest.mark.parametrize("gather_distributed", [False, True])
def test_ours_is_lightlys_step_by_step(size: int, batch: int, gather_distributed: bool) -> None:
    settings = {"memory_bank_size": (size, DIM), "gather_distributed": gather_distributed}
    pair = Pair("NTXentLoss", temperature=0.2, **settings)
    for step in range(STEPS):
        out = tuple(features(2, batch, DIM, seed=step))
        ours, theirs = pair(*out)
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(gradients(ours, *out), gradients(theirs, *out), **EXACT)
        pair.assert_equal_banks()


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(("size", "batch"), [*SIZES, (0, 1), (0, 6)])
def test_lightlys_regularizer_has_the_value_and_no_gradient(size: int, batch: int) -> None:
    pair = Pair("CO2Regularizer", alpha=0.3, memory_bank_size=(size, DIM) if size else 0)
    for step in range(STEPS):
        out = tuple(features(2, batch, DIM, seed=step))
        ours, theirs = pair(*out)
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert ours.requires_grad
        assert not theirs.requires_grad
        if size:
            pair.assert_equal_banks()


def test_without_a_bank_ours_is_lightlys() -> None:
    pair = Pair("NTXentLoss", temperature=0.1)
    for batch in (1, 2, 8):
        out = tuple(features(2, batch, DIM, seed=batch))
        ours, theirs = pair(*out)
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(gradients(ours, *out), gradients(theirs, *out), **EXACT)
