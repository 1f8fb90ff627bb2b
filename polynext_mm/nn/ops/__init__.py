"""The kernels of a PolyNeXt, one module per operation. Maps are (B, H, W, C).

A branch or the start of a cell is computed either by its kernel here or by the layer's equation;
smaller operations have a plain form in torch beside their kernel.
:mod:`~polynext_mm.nn.ops.dispatch` decides whether kernels run.
"""

from .channel_batch_norm import channel_batch_norm
from .clip_gradient import clip_gradient
from .depthwise import depthwise
from .dispatch import plain_ops, triton_ops
from .layer_norm import layer_norm
from .norm_of_pair import norm_of_pair
from .poly_attention import poly_attention
from .poly_attention_sums import poly_attention_sums
from .poly_attn import add_poly_attn, merge_heads, split_heads
from .poly_conv import add_poly_conv, partner_order, swap_partners
from .poly_mlp import add_poly_mlp
from .residual import residual

__all__ = [
    'add_poly_attn',
    'add_poly_conv',
    'add_poly_mlp',
    'channel_batch_norm',
    'clip_gradient',
    'depthwise',
    'layer_norm',
    'merge_heads',
    'norm_of_pair',
    'partner_order',
    'plain_ops',
    'poly_attention',
    'poly_attention_sums',
    'residual',
    'split_heads',
    'swap_partners',
    'triton_ops',
]
