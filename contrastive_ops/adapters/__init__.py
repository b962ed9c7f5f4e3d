"""The losses under the names and signatures of other projects, one module for each.

A module here needs none of the packages that it stands in for. What it computes is their formula, by the
fused losses; its docstrings say where it departs from theirs.

    from contrastive_ops.adapters.lightly import CO2Regularizer, NTXentLoss
    from contrastive_ops.adapters.open_clip import ClipLoss
    from contrastive_ops.adapters.solo_learn import mocov2plus_loss_func, mocov3_loss_func, simclr_loss_func
"""
