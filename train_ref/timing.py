"""How long the loss takes within a step of training."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class LossClock:
    """Times a criterion's forward, and its backward, wherever in a training step they happen.

    Backward begins where the loss's gradient is known, and ends where that of the last of its tensors is. On
    a GPU these are moments of its stream, and reading the clock waits for them.

    Args:
        criterion: a module of tensors that returns a loss, or a loss and something else.
        device: where its tensors are.
    """

    def __init__(self, criterion: nn.Module, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._intervals: list[list[Any]] = []  # [begin, end] of what was timed since the clock was read
        self._watched: list[Any] = []
        self._hooks = [
            criterion.register_forward_pre_hook(self._begin_forward),
            criterion.register_forward_hook(self._end_forward),
        ]

    def read(self) -> float:
        """Seconds in the loss since the last reading."""
        intervals, self._intervals = self._intervals, []
        if self.on_gpu:
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in intervals) / 1000
        return sum(end - begin for begin, end in intervals)

    def remove(self) -> None:
        for hook in (*self._hooks, *self._watched):
            hook.remove()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin_forward(self, criterion: nn.Module, tensors: tuple[Tensor, ...]) -> None:
        for hook in self._watched:  # a weight outlives its step
            hook.remove()
        self._watched = [x.register_hook(self._end_backward) for x in tensors if x.requires_grad]
        self._intervals.append([self._now()] * 2)

    def _end_forward(self, criterion: nn.Module, tensors: tuple[Tensor, ...], output: Any) -> None:
        self._intervals[-1][1] = self._now()
        loss = output[0] if isinstance(output, tuple) else output
        if loss.requires_grad:
            loss.register_hook(self._begin_backward)

    def _begin_backward(self, grad: Tensor) -> None:
        self._intervals.append([self._now()] * 2)

    def _end_backward(self, grad: Tensor) -> None:
        if self._intervals:
            self._intervals[-1][1] = self._now()
