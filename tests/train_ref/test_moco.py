from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_ops import co2_loss, info_nce_loss


def test_the_key_encoder_starts_as_the_query_encoder_and_gets_no_gradient(make_moco, step):
    moco = make_moco()
    for query, key in zip(moco.query_encoder.parameters(), moco.key_encoder.parameters(), strict=True):
        assert torch.equal(query, key)
    step(moco).backward()
    assert all(query.grad is not None for query in moco.query_encoder.parameters())
    assert all(key.grad is None for key in moco.key_encoder.parameters())


def test_the_key_encoder_is_a_moving_average(make_moco):
    moco = make_moco(momentum=0.75)
    before = [parameter.clone() for parameter in moco.key_encoder.parameters()]
    with torch.no_grad():
        for query in moco.query_encoder.parameters():
            query.add_(torch.randn_like(query))
    moco.update_key_encoder()
    for key, query, old in zip(
        moco.key_encoder.parameters(), moco.query_encoder.parameters(), before, strict=True
    ):
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


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_loss_is_that_of_the_step_s_queries_keys_and_queue(make_moco, step, weight):
    moco = make_moco(consistency_weight=weight)
    outputs = {}
    for name in ("query_encoder", "key_encoder"):
        getattr(moco, name).register_forward_hook(lambda *args, name=name: outputs.update({name: args[-1]}))
    queue = moco.queue.keys.clone()
    loss = step(moco)
    query, key = outputs.values()
    expected = (
        co2_loss(query, key, queue, consistency_weight=weight) if weight else info_nce_loss(query, key, queue)
    )
    torch.testing.assert_close(loss, expected)


def test_steps_towards_fixed_keys_lower_the_loss(make_moco, step):
    moco = make_moco(momentum=1.0, consistency_weight=0.0)
    optimizer = torch.optim.SGD(moco.query_encoder.parameters(), lr=0.03)
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
    for prefix in ("", "epoch/"):
        terms = values[f"{prefix}instance_loss"] + 10 * values[f"{prefix}consistency_loss"]
        assert values[f"{prefix}loss"] == pytest.approx(terms, rel=1e-5)
        assert 0 <= values[f"{prefix}top1"] <= values[f"{prefix}top5"] <= 1


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_learning_rate_follows_its_schedule(make_moco, make_views, make_trainer, schedule):
    moco = make_moco(learning_rate=0.5, schedule=schedule)
    rates = []
    moco.on_train_batch_start = lambda *args: rates.append(moco.optimizers().param_groups[0]["lr"])
    make_trainer(max_epochs=5).fit(moco, make_views())  # 10 steps
    expected = {
        "cosine": [0.25 * (1 + math.cos(math.pi * t / 10)) for t in range(10)],
        "step": [0.5] * 6 + [0.05] * 2 + [0.005] * 2,
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
