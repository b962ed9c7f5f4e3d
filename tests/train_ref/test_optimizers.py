"""LARS against its formula in float64, and what each optimizer leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from train_ref.errors import UsageError
from train_ref.networks import network
from train_ref.optimizers import optimizer_of

LR, DECAY = 4.8, 1e-2


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    layers.register_parameter("lies_at_zero", nn.Parameter(torch.zeros(2, 2)))
    return layers.double()


def gradients(parameters: list[Tensor], step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]


def lars(weights: list[Tensor], steps: int, decay: float) -> list[Tensor]:
    """You et al.'s equations, with momentum as in PyTorch's SGD."""
    weights = [w.clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(steps):
        for w, v, g in zip(weights, momenta, gradients(weights, step), strict=True):
            if w.ndim > 1:
                norm = (w**2).sum().sqrt()
                scale = 0.001 * norm / ((g**2).sum().sqrt() + decay * norm + 1e-8) if norm > 0 else 1.0
                g = scale * (g + decay * w)
            v.mul_(0.9).add_(g)
            w.sub_(LR * v)
    return weights


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(parameters, gradients(parameters, step), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lars_is_its_formula(decay):
    parameters = list(net().parameters())
    expected = lars([p.detach() for p in parameters], 5, decay)
    module = net()
    take_steps(optimizer_of("lars", module, LR, decay), list(module.parameters()), range(5))
    for p, w in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_lars_goes_on_from_its_state():
    whole, stopped = net(), net()
    take_steps(optimizer_of("lars", whole, LR, DECAY), list(whole.parameters()), range(6))
    first = optimizer_of("lars", stopped, LR, DECAY)
    take_steps(first, list(stopped.parameters()), range(3))
    second = optimizer_of("lars", stopped, 1.0, 0.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, list(stopped.parameters()), range(3, 6))
    for p, q in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["lars", "adamw"])
@pytest.mark.parametrize("arch", ["convnet", "timm/test_vit"])
def test_biases_and_norms_do_not_decay(name, arch):
    module = network(arch)
    matrices, vectors = optimizer_of(name, module, 0.1, 0.5).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    names = {id(p): each for each, p in module.named_parameters()}
    told = {names[id(p)] for p in vectors["params"]}
    norms = {
        f"{name}.{each}"
        for name, child in module.named_modules()
        if isinstance(child, nn.BatchNorm2d | nn.LayerNorm)
        for each, _ in child.named_parameters(recurse=False)
    }
    assert norms
    assert told == norms | {each for each in names.values() if each.endswith("bias")}
    assert len(told) + len(matrices["params"]) == len(names)


def test_sgd_decays_everything():
    (group,) = optimizer_of("sgd", net(), 0.1, 0.5).param_groups
    assert (group["weight_decay"], len(group["params"])) == (0.5, 7)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_training_with_it_is_resumed_exactly(make_method, make_trainer, make_views, tmp_path, name):
    def run(ckpt_path=None):
        method = make_method("simclr", optimizer=name, learning_rate=0.1, warmup=0.2)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(max_epochs=3, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(method, make_views(), ckpt_path=ckpt_path)
        return method.encoder.state_dict()

    whole = run()
    torch.testing.assert_close(run(tmp_path / "step=3.ckpt"), whole, rtol=0, atol=0)


def test_conic_takes_steps_of_sgd(make_method):
    with pytest.raises(UsageError, match=r"model.optimizer is lars, and must be sgd: ConIC's classifier"):
        make_method("conic", optimizer="lars")


def test_another_optimizer_does_not_go_on(make_method, make_trainer, make_views, tmp_path):
    trainer = make_trainer()
    trainer.fit(make_method("simclr"), make_views())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(UsageError, match=r"model.optimizer is adamw, but the run of the checkpoint has sgd"):
        make_trainer(max_epochs=2).fit(
            make_method("simclr", optimizer="adamw"), make_views(), ckpt_path=tmp_path / "it.ckpt"
        )
