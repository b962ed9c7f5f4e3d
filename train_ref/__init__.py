"""The reference trainer: contrastive pretraining with the losses of `contrastive_ops`, evaluated at its end.

``python -m train_ref fit --config train_ref/recipes/<name>.yaml`` trains a recipe, ``--help`` lists the rest.
"""
