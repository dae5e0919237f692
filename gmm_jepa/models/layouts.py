"""Names of tensors and settings in the published checkpoints, kind by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.models.transformer import TransformerConfig
from gmm_jepa.ops.density import CHUNKS

Renames = list[tuple[str, str]]

_CONFORMER: Renames = [
    (r"^online\.", ""),
    (r"^front_end\.stages\.", "encoder."),
    (r"^front_end\.projection\.", "proj."),
    (r"^front_end\.", ""),
    (r"\.residual\.", ".res."),
    (r"\.dilated\.", ".convs1."),
    (r"\.plain\.", ".convs2."),
    (r"\.snake\.alpha$", ".snake.a"),
    (r"\.daam\.offsets$", ".gaatn.{heads}.{chunk}.mean_offsets"),
    (r"\.daam\.widths$", ".gaatn.{heads}.{chunk}.c"),
    (r"^aggregation\.", "layer_attention."),
    (r"^blocks\.", "conformers."),
    (r"^predictor\.in_proj\.", "predictor.0."),
    (r"^predictor\.block\.", "predictor.2."),
    (r"^predictor\.out_proj\.", "predictor.3."),
    (r"\.(ff[12])\.up\.", r".\1.0."),
    (r"\.(ff[12])\.down\.", r".\1.3."),
    (r"\.attention\.", "."),
    (r"\.convolution\.norm_in\.", ".conv.0."),
    (r"\.convolution\.up\.", ".conv.1."),
    (r"\.convolution\.depthwise\.", ".conv.3."),
    (r"\.convolution\.norm_out\.", ".conv.4."),
    (r"\.convolution\.down\.", ".conv.6."),
    (r"^relative_bias\.embedding\.", "rel_pos_bias.rel_pos_embed."),
]
_CLUSTER_HEAD: Renames = [
    (r"^cluster_head\.blocks\.(\d)\.norm\.", r"cluster_head.blocks.\1.0."),
    (r"^cluster_head\.blocks\.(\d)\.up\.", r"cluster_head.blocks.\1.1."),
    (r"^cluster_head\.blocks\.(\d)\.down\.", r"cluster_head.blocks.\1.4."),
]
_JEPA_CONFORMER: Renames = [
    *_CONFORMER,
    *_CLUSTER_HEAD,
    (r"\{heads\}", "layers.0.heads"),
    (r"^relative_bias\.gate_u$", "rel_pos_bias.gate_u_vec"),
    (r"^relative_bias\.gate_r$", "rel_pos_bias.gate_w_vec"),
    (r"^relative_bias\.scale$", "rel_pos_bias.gate_scale_scalar"),
]
_WAVLM_STYLE: Renames = [
    *_CONFORMER,
    (r"\{heads\}", "heads"),
    (r"^relative_bias\.gate_u$", "rel_pos_bias.gate_u"),
    (r"^relative_bias\.gate_r$", "rel_pos_bias.gate_w"),
    (r"^relative_bias\.scale$", "rel_pos_bias.scale"),
    (r"^mask_token$", "mask_emb"),
    (r"^cluster_head\.", "final_proj."),
]
_JEPA_TRANSFORMER: Renames = [
    (r"^online\.", ""),
    (r"^front_end\.convolutions\.(\d)\.", r"feature_extractor.conv_layers.\1.0."),
    (r"^front_end\.norms\.(\d)\.", r"feature_extractor.conv_layers.\1.1."),
    (r"^front_end\.projection\.", "post_extract_proj."),
    (r"^front_end\.norm\.", "layer_norm."),
    (r"^blocks\.", "layers."),
    (r"\.attention_norm\.", ".self_attn_layer_norm."),
    (r"\.ffn_norm\.", ".final_layer_norm."),
    (r"^(layers\.\d+)\.up\.", r"\1.fc1."),
    (r"^(layers\.\d+)\.down\.", r"\1.fc2."),
    (r"^relative_bias\.gate_r\.", "rel_pos_bias.gate_ur."),
    (r"^relative_bias\.gate_u\.", "rel_pos_bias.gate_i."),
    (r"^relative_bias\.scale$", "rel_pos_bias.scale"),
    (r"^relative_bias\.embedding\.", "rel_pos_bias.rel_pos_embed."),
    (r"^predictor\.in_proj\.", "predictor.0."),
    (r"^predictor\.out_proj\.", "predictor.2."),
    *_CLUSTER_HEAD,
]


@dataclass(frozen=True)
class Layout:
    """One kind of published checkpoint."""

    kind: str
    """As the published ``config.json`` names it."""
    config: type[ConformerConfig] | type[TransformerConfig]
    renames: Renames
    """Patterns from our names to the published ones, applied in turn."""
    pointwise: str
    """Published names of linear layers that are stored as 1x1 convolutions."""
    config_names: dict[str, str]
    """Fields of our config and their published names."""
    n_clusters: str
    """Published name of the number of clusters."""
    blocks: str
    """Prefix of the blocks, under each of which the shared position bias is stored again."""
    bias_users: tuple[str, ...] = ()
    """Further prefixes with such a copy."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Fields of our config that this kind implies."""
    predicts: bool = True
    """Whether there are a predictor and a teacher."""
    cluster_head: str = "mlp"

    def views(self, ours: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The published entries of one of our tensors, as views of it."""
        theirs = ours
        for pattern, replacement in self.renames:
            theirs = re.sub(pattern, replacement, theirs)
        if "{chunk}" in theirs:
            for chunk in range(CHUNKS):
                yield theirs.format(chunk=chunk), tensor[chunk]
        elif re.search(self.pointwise, theirs):
            yield theirs, tensor[..., None]
        elif re.search(r"^mask_token$|\.snake\.a$", theirs):
            yield theirs, tensor[None, :, None]
        else:
            yield theirs, tensor

    def bias_copies(self, n_layers: int, *, with_heads: bool) -> list[str]:
        """Prefixes under which the shared position bias appears again."""
        copies = [f"{self.blocks}.{i}." for i in range(n_layers)]
        return [*copies, *(self.bias_users if with_heads else ())]


_CONFORMER_CONFIG = {
    "code_dim": "code_dim",
    "channels": "channels",
    "strides": "strides",
    "residual_blocks": "n_res",
    "layers": "n_conformer",
    "heads": "heads",
    "daam": "use_gaatn",
    "relative_bias": "use_rel_pos",
}
_TRANSFORMER_CONFIG = {
    "code_dim": "code_dim",
    "conv_dim": "conv_dim",
    "layers": "num_layers",
    "heads": "num_heads",
    "ffn_dim": "ff_dim",
}

LAYOUTS = {
    layout.kind: layout
    for layout in (
        Layout(
            kind="jepa_conformer",
            config=ConformerConfig,
            renames=_JEPA_CONFORMER,
            pointwise=r"^(proj|predictor\.[03]|.*\.conv\.[16])\.weight$",
            config_names=_CONFORMER_CONFIG,
            n_clusters="K",
            blocks="conformers",
            bias_users=("predictor.2.",),
            fixed={"aggregation": "attention"},
        ),
        Layout(
            kind="jepa_transformer",
            config=TransformerConfig,
            renames=_JEPA_TRANSFORMER,
            pointwise=r"^predictor\.[02]\.weight$",
            config_names=_TRANSFORMER_CONFIG,
            n_clusters="K",
            blocks="layers",
        ),
        Layout(
            kind="wavlm_style",
            config=ConformerConfig,
            renames=_WAVLM_STYLE,
            pointwise=r"^(proj|.*\.conv\.[16])\.weight$",
            config_names=_CONFORMER_CONFIG,
            n_clusters="num_classes",
            blocks="conformers",
            fixed={"aggregation": "last"},
            predicts=False,
            cluster_head="linear",
        ),
    )
}


def layout_of(model: JepaModel) -> Layout:
    """The published kind that a model is of.

    Raises:
        InputError: the published code has none like it.
    """
    alike = [layout for layout in LAYOUTS.values() if isinstance(model.config, layout.config)]
    found = {layout.kind: list(_differences(model, layout)) for layout in alike}
    nearest = min(found, key=lambda kind: len(found[kind]))
    if found[nearest]:
        raise InputError(
            f"model: no published kind is like it; the nearest, {nearest}, has "
            f"{', '.join(found[nearest])} (for other tools: gmm-jepa export)"
        )
    return LAYOUTS[nearest]


def _differences(model: JepaModel, layout: Layout) -> Iterator[str]:
    """What the published kind has where the model is unlike it."""
    if model.head_kind != layout.cluster_head:
        yield f"the cluster head {layout.cluster_head}, not {model.head_kind}"
    if model.predicts != layout.predicts:
        yield f"{'a' if layout.predicts else 'no'} predictor"
    for name, value in layout.fixed.items():
        ours = getattr(model.config, name)
        if ours != value:
            yield f"{name.replace('_', ' ')} {value}, not {ours}"
