"""GPU kernels in Triton and their launchers (installed as `contrastive_ops.kernels`)."""
