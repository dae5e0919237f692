"""Python imports this as it starts, in every process of a command with null CUDA."""

import os
import sys
import traceback


def _begin() -> None:
    import torch

    torch.backends.cudnn.enabled = False
    if os.environ["NULL_CUDA"] == "values":
        from bench.null_cuda.values import compute_on_the_host

        compute_on_the_host()
    else:
        # It computes constants on the device while it compiles, and reads them.
        torch._inductor.config.joint_graph_constant_folding = False


if "NULL_CUDA" in os.environ:
    try:
        _begin()
    except ModuleNotFoundError as error:
        if error.name != "torch":  # another Python's, which has none
            traceback.print_exc()
            sys.exit("null CUDA could not begin")
    except Exception:
        traceback.print_exc()
        sys.exit("null CUDA could not begin")
