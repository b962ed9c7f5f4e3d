"""The reference trainer: contrastive pretraining with the losses of `contrastive_ops`, evaluated at its end.

``python -m train_ref fit --config digits_moco_v2_co2`` trains as a recipe says, ``--help`` lists the rest.
"""
