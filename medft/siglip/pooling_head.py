"""Splits the pooling head's attention into linear layers for adapters, and joins it again.

Stock code keeps three of its layers in one parameter and never calls the fourth as a module, so
that an adapter on it would have no effect.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipModel


class SplitAttention(nn.Module):
    """An nn.MultiheadAttention as four linear layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """Attention of [B, Q, D] over [B, K, D]; attention weights are not returned."""
        heads = [
            projection(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, part in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        ]
        attended = functional.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def joined(self) -> nn.MultiheadAttention:
        """The stock module with the current weights."""
        width, like = self.out_proj.in_features, self.out_proj.weight
        joined = nn.MultiheadAttention(
            width, self.num_heads, batch_first=True, device=like.device, dtype=like.dtype
        )
        parts = (self.q_proj, self.k_proj, self.v_proj)
        joined.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
        joined.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
        joined.out_proj.weight.data = self.out_proj.weight.data
        joined.out_proj.bias.data = self.out_proj.bias.data
        return joined.train(self.training)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    made.bias = nn.Parameter(bias.detach().clone())
    return made


def split_pooling_head(model: SiglipModel) -> None:
    """Split the attention of the pooling head, so that adapters can sit on its layers."""
    model.vision_model.head.attention = SplitAttention(model.vision_model.head.attention)


def join_pooling_head(model: SiglipModel) -> None:
    """Undo `split_pooling_head`, the adapter merged, so that plain transformers loads the model."""
    model.vision_model.head.attention = model.vision_model.head.attention.joined()
