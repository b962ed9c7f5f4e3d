from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from contrastive_ops import co2_loss, info_nce_loss
from train_ref.networks import normalize_in_groups

from .conftest import Sendings


def test_the_key_encoder_starts_as_the_query_encoder_and_gets_no_gradient(make_moco, step):
    moco = make_moco()
    for query, key in zip(moco.encoder.parameters(), moco.key_encoder.parameters(), strict=True):
        assert torch.equal(query, key)
    step(moco).backward()
    assert all(query.grad is not None for query in moco.encoder.parameters())
    assert all(key.grad is None for key in moco.key_encoder.parameters())


def test_the_key_encoder_is_a_moving_average(make_moco):
    moco = make_moco(momentum=0.75)
    before = [parameter.clone() for parameter in moco.key_encoder.parameters()]
    with torch.no_grad():
        for query in moco.encoder.parameters():
            query.add_(torch.randn_like(query))
    moco.update_key_encoder()
    for key, query, old in zip(moco.key_encoder.parameters(), moco.encoder.parameters(), before, strict=True):
        torch.testing.assert_close(key, 0.75 * old + 0.25 * query)


def test_the_queue_holds_the_latest_keys_in_order(make_moco, step):
    moco = make_moco(queue_size=20)
    keys = []
    moco.key_encoder.register_forward_hook(lambda module, inputs, output: keys.append(F.normalize(output)))
    for _ in range(3):
        step(moco, batch_size=8)
    first, second, third = keys
    assert moco.queue.pointer == 4  # 24 keys wrapped around 20 rows
    torch.testing.assert_close(moco.queue.keys, torch.cat((third[4:], first[4:], second, third[:4])))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-mixed", torch.bfloat16)],
)
def test_the_queue_is_in_the_dtype_that_queries_are_multiplied_in(
    make_moco, make_views, make_trainer, precision, dtype
):
    """Its keys are normalised before they are rounded: a bfloat16 norm would be off by a thousandth."""
    moco = make_moco(queue_size=20)
    make_trainer(precision=precision, limit_train_batches=2).fit(moco, make_views())
    assert moco.queue.keys.dtype == dtype
    assert moco.queue.pointer.dtype == torch.int64
    lengths = moco.queue.keys.double().norm(dim=1)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=rounding / 2 + 1e-6)


def test_a_queue_is_resumed_in_another_precision(make_moco, make_views, make_trainer, tmp_path):
    views, path = make_views(), tmp_path / "some.ckpt"
    moco = make_moco()
    trainer = make_trainer(precision="bf16-mixed", max_epochs=1)
    trainer.fit(moco, views)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["state_dict"]["queue.keys"].dtype == torch.bfloat16
    other = make_moco()
    make_trainer(max_epochs=1).fit(other, views, ckpt_path=path)  # no step is left
    assert other.queue.keys.dtype == torch.float32
    assert torch.equal(other.queue.keys, moco.queue.keys.float())


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_loss_is_that_of_the_step_s_queries_keys_and_queue(make_moco, step, weight):
    moco = make_moco(consistency_weight=weight)
    outputs = {}
    for name in ("encoder", "key_encoder"):
        getattr(moco, name).register_forward_hook(lambda *args, name=name: outputs.update({name: args[-1]}))
    queue = moco.queue.keys.clone()
    loss = step(moco)
    query, key = outputs.values()
    expected = (
        co2_loss(query, key, queue, consistency_weight=weight) if weight else info_nce_loss(query, key, queue)
    )
    torch.testing.assert_close(loss, expected)


def test_keys_are_shuffled_among_groups_and_come_back_in_order(make_moco, step):
    """No query shares batch statistics with its key, and each still meets its own."""
    moco = make_moco(norm_groups=4).double()
    normalize_in_groups(moco.encoder, 4), normalize_in_groups(moco.key_encoder, 4)
    views = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    seen = []
    moco.key_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moco._trainer = SimpleNamespace(current_epoch=2, accumulate_grad_batches=1)
    moco.train()
    keys = moco.encode_keys(views, batch_idx=5)
    (shuffled,) = seen
    order = [int((views == view).flatten(1).all(1).nonzero()) for view in shuffled]
    assert sorted(order) == list(range(16))
    groups = [set(order[i : i + 4]) for i in range(0, 16, 4)]
    assert all(group != set(range(i, i + 4)) for i, group in zip(range(0, 16, 4), groups, strict=True))
    torch.testing.assert_close(keys[order], moco.key_encoder(shuffled))
    moco.encode_keys(views, batch_idx=6)
    assert not torch.equal(seen[0], seen[-1])  # another step, another order


def test_the_key_encoder_moves_once_a_step_of_the_optimizer(make_moco, make_views, make_trainer):
    moco = make_moco()
    moves = []
    move = moco.update_key_encoder
    moco.update_key_encoder = lambda: moves.append(1) or move()
    make_trainer(accumulate_grad_batches=2).fit(moco, make_views(synthetic_size=32))
    assert len(moves) == 2


def test_steps_towards_fixed_keys_lower_the_loss(make_moco, step):
    moco = make_moco(momentum=1.0, consistency_weight=0.0)
    optimizer = torch.optim.SGD(moco.encoder.parameters(), lr=0.03)
    start = copy.deepcopy(moco.queue.state_dict())
    losses = []
    for _ in range(6):
        moco.queue.load_state_dict(start)
        torch.manual_seed(0)  # the same views again
        losses.append(step(moco))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_logged_values_are_the_terms_of_the_loss(make_moco, make_views, make_trainer):
    trainer = make_trainer()
    trainer.fit(make_moco(consistency_weight=10.0), make_views())
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values["loss"] == pytest.approx(
        values["instance_loss"] + 10 * values["consistency_loss"], rel=1e-5
    )
    assert 0 <= values["top1"] <= values["top5"] <= 1


@pytest.mark.parametrize("schedule", ["cosine", "step", "warmup"])
def test_the_learning_rate_follows_its_schedule(make_moco, make_views, make_trainer, schedule):
    settings = {"schedule": "cosine", "warmup": 0.4} if schedule == "warmup" else {"schedule": schedule}
    moco = make_moco(learning_rate=0.5, **settings)
    rates = []
    moco.on_train_batch_start = lambda *args: rates.append(moco.optimizers().param_groups[0]["lr"])
    make_trainer(max_epochs=5).fit(moco, make_views())  # 10 steps
    expected = {
        "cosine": [0.25 * (1 + math.cos(math.pi * t / 10)) for t in range(10)],
        "step": [0.5] * 6 + [0.05] * 2 + [0.005] * 2,
        "warmup": [0.1, 0.2, 0.3, 0.4] + [0.25 * (1 + math.cos(math.pi * t / 6)) for t in range(6)],
    }
    assert rates == pytest.approx(expected[schedule])


def test_the_optimizer_is_the_papers_sgd(make_moco, make_views, make_trainer):
    trainer = make_trainer()
    trainer.fit(make_moco(weight_decay=1e-3), make_views())
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["weight_decay"] == 1e-3
    assert not optimizer.defaults["nesterov"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_key_encoder_s_momentum_follows_its_schedule(make_moco, make_views, make_trainer, schedule):
    moco = make_moco(momentum=0.9, momentum_schedule=schedule)
    momenta = []
    move = moco.update_key_encoder
    moco.update_key_encoder = lambda: momenta.append(moco.momentum()) or move()
    make_trainer(max_epochs=5).fit(moco, make_views())  # 10 steps
    cosine = [1 - 0.1 * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert momenta == pytest.approx([0.9] * 10 if schedule == "constant" else cosine)


def test_a_scheduled_momentum_is_resumed_exactly(make_moco, make_views, make_trainer, tmp_path):
    def run(ckpt_path=None):
        moco = make_moco(momentum_schedule="cosine")
        saving = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
        make_trainer(max_epochs=3, callbacks=[saving], enable_checkpointing=True).fit(
            moco, make_views(), ckpt_path=ckpt_path
        )
        return moco.state_dict()

    whole = run()
    torch.testing.assert_close(run(tmp_path / "kept" / "step=3.ckpt"), whole, rtol=0, atol=0)


def test_nobody_waits_for_a_device_to_shuffle_keys(make_moco):
    """One without memory will do, as none is needed to see what is sent there."""
    moco = make_moco(norm_groups=4).to("meta")
    moco._trainer = SimpleNamespace(current_epoch=0)
    views = torch.empty(8, 3, 8, 8, device="meta")
    with Sendings(views.device) as sendings:
        moco.encode_keys(views, batch_idx=0)
    assert len(sendings.copies) == 1
    assert not sendings.blocking


def test_keys_are_not_shuffled_for_a_network_without_batch_norm(make_method, step):
    """There are no statistics that could tell the positive, and images need not travel."""
    moco = make_method("moco", arch="timm/test_vit", norm_groups=4, queue_size=20)
    assert not moco.shuffles_keys
    assert make_method("moco", norm_groups=4, queue_size=20).shuffles_keys
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(moco.encode_keys(images, 0), moco.key_encoder(images))
