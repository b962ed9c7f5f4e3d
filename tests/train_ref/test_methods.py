"""SimCLR and InstDisc, and what all methods have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from contrastive_ops import nt_xent_loss
from train_ref.callbacks import Record
from train_ref.data import Views
from train_ref.errors import UsageError
from train_ref.methods import KINDS


def digits() -> Views:
    return Views(augmentation="digits_v1", batch_size=32)  # which are drawn faster than v2's


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_simclr_contrasts_both_views_of_the_batch(make_method, step, weight):
    simclr = make_method("simclr", consistency_weight=weight)
    outputs = []
    simclr.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss = step(simclr)
    view1, view2 = outputs[0].chunk(2)
    torch.testing.assert_close(
        loss, nt_xent_loss(view1, view2, temperature=0.1, consistency_weight=weight, backend="reference")
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in simclr.encoder.parameters())


@pytest.mark.parametrize("views", [1, 2])
def test_instdisc_classifies_by_past_features_and_remembers_the_new(make_method, step, views):
    instdisc = make_method("instdisc", views=views)
    instdisc._make_bank(20)
    rows = instdisc.bank.rows.clone()
    outputs = []
    instdisc.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss = step(instdisc)
    features = F.normalize(outputs[0]).unflatten(0, (views, 8))
    logits = features @ rows.T / 0.07
    expected = sum(F.cross_entropy(of_view, torch.arange(8)) for of_view in logits)
    torch.testing.assert_close(loss, expected)

    assert torch.equal(instdisc.bank.rows, rows)  # backward still needs them
    loss.backward()
    instdisc.on_after_backward()
    torch.testing.assert_close(
        instdisc.bank.rows[:8], F.normalize(0.5 * rows[:8] + 0.5 * features.detach().mean(0))
    )
    assert torch.equal(instdisc.bank.rows[8:], rows[8:])


@pytest.mark.parametrize("name", ["simclr", "instdisc"])
def test_the_loss_falls_on_digits(make_method, make_trainer, name):
    record = Record()
    method = make_method(name, learning_rate=0.03)
    make_trainer(max_epochs=2, callbacks=[record]).fit(method, digits())  # InstDisc must have seen all images
    first, last = (epoch["loss"] for epoch in record.epochs)
    assert last < 0.85 * first


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_says_what_it_is_of_and_loads_without_images(make_method, make_trainer, name, tmp_path):
    method = make_method(name)
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(method, digits())
    path = tmp_path / "some.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["method"] == name
    loaded = KINDS[name].load_from_checkpoint(path)
    torch.testing.assert_close(
        dict(loaded.backbone.state_dict()), dict(method.backbone.state_dict()), rtol=0, atol=0
    )
    assert loaded.hparams.dim == 16


def test_a_checkpoint_of_another_network_is_told_in_a_sentence(make_method, make_trainer, tmp_path):
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(make_method("simclr"), digits())
    path = Path(tmp_path / "some.ckpt")
    trainer.save_checkpoint(path)
    with pytest.raises(UsageError, match=r"ckpt_path: the checkpoint is of another network"):
        make_trainer().fit(make_method("simclr", dim=8), digits(), ckpt_path=path)


@pytest.mark.parametrize(
    ("changed", "limit", "message"),
    [
        (
            {"learning_rate": 0.5},
            2,
            "model.learning_rate is 0.5, but the run of the checkpoint has 0.03: the opt",
        ),
        ({"weight_decay": 0.0}, 2, "model.weight_decay is 0.0, but the run of the checkpoint has 0.0001: "),
        ({"seed": 3}, 2, "model.seed is 3, but the run of the checkpoint has 0: "),
        ({}, 3, "trainer.limit_train_batches is 3, but the run of the checkpoint has 2: "),
    ],
)
@pytest.mark.parametrize("name", ["simclr", "instdisc"])
def test_settings_that_a_checkpoint_brings_are_not_ignored(
    make_method, make_trainer, tmp_path, name, changed, limit, message
):
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(make_method(name), digits())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    trainer = make_trainer(limit_train_batches=limit, max_epochs=2)
    method = make_method(name, **changed)
    with pytest.raises(UsageError, match=f"^{message}"):
        trainer.fit(method, digits(), ckpt_path=tmp_path / "some.ckpt")
    assert trainer.global_step in (0, 2)


def test_what_takes_effect_may_change(make_method, make_trainer, tmp_path):
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(make_method("simclr"), digits())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    trainer = make_trainer(limit_train_batches=2, max_epochs=3)
    changed = {"temperature": 0.5, "schedule": "step", "consistency_weight": 1.0}
    trainer.fit(make_method("simclr", **changed), digits(), ckpt_path=tmp_path / "some.ckpt")
    assert trainer.global_step == 6
    loaded = KINDS["simclr"].load_from_checkpoint(tmp_path / "some.ckpt", learning_rate=0.5)
    assert loaded.hparams.learning_rate == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "size", "works"),
    [
        ("moco", {"queue_size": 20}, 8, True),
        ("moco", {"queue_size": 20}, 4, False),  # the last convolution leaves a single pixel
        ("moco", {"queue_size": 20, "head": "mlp_bn"}, 8, False),
        ("instdisc", {}, 4, False),
        ("instdisc", {"views": 2}, 4, True),
        ("simclr", {}, 4, True),
        ("conic", {"active": 8}, 4, True),
    ],
)
def test_statistics_of_a_single_value_are_refused(make_method, make_trainer, name, settings, size, works):
    views = Views(augmentation="small", image_size=size, batch_size=1)
    method, trainer = make_method(name, **settings), make_trainer(max_steps=1)
    if works:
        trainer.fit(method, views)
    else:
        with pytest.raises(UsageError, match=r"data.batch_size is 1 and model.norm_groups 1: batch norm"):
            trainer.fit(method, views)


@pytest.mark.parametrize("groups", [3, 5])
def test_groups_must_share_the_batch_evenly(make_method, make_trainer, groups):
    with pytest.raises(UsageError, match=f"model.norm_groups is {groups}"):
        make_trainer().fit(make_method("simclr", norm_groups=groups), digits())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("name", KINDS)
def test_other_precisions(make_method, make_trainer, name, precision):
    method = make_method(name, **({"active": 128} if name == "conic" else {}))
    trainer = make_trainer(limit_train_batches=2, precision=precision)
    trainer.fit(method, digits())
    assert torch.isfinite(method.values["loss"])
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert method.values["loss"].dtype == expected


def test_a_size_that_the_network_does_not_take_is_told_before_the_training(make_method, make_trainer):
    method = make_method("simclr", arch="timm/test_vit")
    with pytest.raises(UsageError, match=r"data.image_size is 8, which a timm/test_vit does not take: .*16"):
        make_trainer().fit(method, digits())
    assert method.backbone.training


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_size_of_several_views_must_be_one_that_the_network_takes(make_method, make_trainer, batch_size):
    """Also before it is asked what batch norm makes of a single image of that size."""
    method = make_method("conic", arch="timm/test_vit", head="mlp", active=8)
    views = {"augmentation": "small", "image_size": 32, "small_views": 1, "batch_size": batch_size}
    make_trainer(max_steps=1).fit(method, Views(**views, small_size=16))
    with pytest.raises(
        UsageError, match=r"^data.small_size is 20, which a timm/test_vit does not take: .*16"
    ):
        make_trainer().fit(method, Views(**views, small_size=20))


def test_statistics_of_a_single_small_view_are_refused(make_method, make_trainer):
    views = {"augmentation": "small", "small_size": 4, "batch_size": 1}
    make_trainer(max_steps=1).fit(make_method("conic", active=8), Views(**views, small_views=2))
    with pytest.raises(UsageError, match=r"a single image of 4 pixels, as data.small_size says"):
        make_trainer().fit(make_method("conic", active=8), Views(**views, small_views=1))
