"""The host code of the backends for GPUs: how an operator's kernels are planned, and launched or replayed.

A function here is an operator, or one of the steps of a loss, by the kernels of a backend, which it takes
first: a `launch.Kernels`. It needs no GPU, and the compiler of none.
"""
