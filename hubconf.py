"""Entry points of `torch.hub`; s3prl's runner takes them with a checkpoint's path."""

dependencies = ["torch", "numpy", "safetensors"]


def gmm_jepa_local(ckpt, *args, **kwargs):
    """An s3prl upstream from a run folder, a model file or a published checkpoint.

    Args:
        ckpt: its path.
    """
    from gmm_jepa.export.s3prl import UpstreamExpert

    return UpstreamExpert(ckpt, **kwargs)
