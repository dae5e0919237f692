"""Triton kernels, one op per file; called through `gmm_jepa.ops` only."""
