"""Triton kernels: the operators of contrastive_ops/_ops.py on NVIDIA GPUs from compute capability 8.0 on."""

import torch

from ._co2 import co2

__all__ = ["DTYPES", "MAX_DIM", "co2"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the query; the queue may have any
MAX_DIM = 1024
