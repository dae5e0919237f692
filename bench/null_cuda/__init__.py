"""CUDA where there is no GPU, to run what the package does for one.

    python -m bench.null_cuda python -m bench.host_time
    python -m bench.null_cuda --values pytest -m gpu tests/train
    python -m bench.null_cuda --values --devices 2 torchrun --nproc-per-node 2 ...

A library of this folder takes the place of NVIDIA's: torch finds a device, whose memory is the
host's and whose kernels are counted and not run (`runtime.cpp`). Triton and torch.compile compile
for it as for an H200. So what the host does shows: how many kernels it launches, whether it waits
for the device, how long it takes for a step, whether a CUDA graph can be recorded. The numbers that
come out mean nothing.

With ``--values`` they do: torch's operations run on the CPU, on the device's memory (`values.py`),
and Triton's kernels in its interpreter. That is the package's own way through CUDA, eager, its
choices and kernels, two processes too (gloo for NCCL), with a GPU's results to rounding.

Neither is a GPU. No kernel's machine code runs, so nothing is said of its speed, of races or of
tensor cores. With values nothing is compiled (torch.compile steps aside), no wait is seen, and
random numbers are a CPU's. The native EM is off, since it holds NVIDIA's runtime itself; cuDNN is
off, so a convolution launches im2col and a product for each row.

Needs gcc and a torch built for CUDA, with NVIDIA's headers as pip installs them.
"""
