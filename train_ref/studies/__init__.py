"""What the papers claim, at small scale: ``python -m train_ref study <name> [options]``.

Each study trains its variants on scikit-learn's digits with several seeds, of each seed on the same views and
from the same network, and leaves a figure and its numbers; ``python -m train_ref report`` puts them into
docs/results.md, which says what came of them.
"""
