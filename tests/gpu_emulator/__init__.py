"""Executes compiled kernels on CPU tensors, as PTX: an emulator behind a stub of the CUDA driver.

`GPU_EMULATOR=sm_80` (or sm_89, sm_90) in the environment of the tests makes the backends "triton" and "cuda"
serve CPU tensors through it, sm_75 the latter alone. The package's host code, Triton's compiler and launcher,
NVRTC and NVIDIA's Python package are the real ones; what an assembler and a GPU would do is done here, a
number of blocks at a time, with numpy over their threads.

What it checks besides the numbers: every access of global memory lies within a tensor that was passed, and is
aligned; shared memory begins as NaN, and its bounds hold. Two warps do not touch the same bytes between
barriers if one writes; nothing touches what an asynchronous copy or product has not yet done with. What it
cannot see: the rounding of real tensor cores and special functions, missing proxy fences, and time.
"""
