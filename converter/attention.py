"""nn.MultiheadAttention with its projections as layers, so that they can be factored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactoredAttention(nn.Module):
    """Multi-head attention whose packed `in_proj` and whose `out_proj` are linear or factored.

    Takes the place of nn.MultiheadAttention: the same forward signature, masks and results; stays
    scaled-dot-product attention. `in_proj` maps E → 3E (queries, keys, values packed).
    """

    # nn.TransformerEncoderLayer reads these; False keeps it off the fused path, which needs the
    # packed weights as plain tensors.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        in_proj: nn.Module,
        out_proj: nn.Module,
        *,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
    ):
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.embed_dim = out_proj.out_features
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention) -> FactoredAttention:
        """Open an attention up: both projections become linear layers on the same parameters."""
        width = attention.embed_dim
        in_proj = nn.utils.skip_init(nn.Linear, width, 3 * width, bias=False, device="meta")
        in_proj.weight = attention.in_proj_weight
        in_proj.bias = attention.in_proj_bias
        new = cls(
            in_proj,
            attention.out_proj,
            num_heads=attention.num_heads,
            dropout=attention.dropout,
            batch_first=attention.batch_first,
        )
        return new.train(attention.training)

    def dense(self) -> nn.MultiheadAttention:
        """nn.MultiheadAttention, of the same parameters where a projection is linear."""
        in_proj, out_proj = (
            layer if isinstance(layer, nn.Linear) else layer.dense()
            for layer in (self.in_proj, self.out_proj)
        )
        new = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=in_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        new.in_proj_weight, new.in_proj_bias = in_proj.weight, in_proj.bias
        new.out_proj.weight, new.out_proj.bias = out_proj.weight, out_proj.bias
        return new.train(self.training)

    @property
    def in_proj_bias(self) -> nn.Parameter | None:
        """(3E,): read by nn.TransformerEncoderLayer."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (L, N, E), or (N, L, E) if `batch_first`, or (L, E)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        if query is key and key is value:
            q, k, v = self.in_proj(query).chunk(3, dim=-1)
        else:
            q, k, v = (self._project(x, i) for i, x in enumerate((query, key, value)))
        attended = _attend(
            q,
            k,
            v,
            self.num_heads,
            self.batch_first,
            self.dropout if self.training else 0.0,
            key_padding_mask,
            attn_mask,
            need_weights,
            average_attn_weights,
        )
        return self.out_proj(attended[0]), attended[1]

    def _project(self, x: Tensor, part: int) -> Tensor:
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        bias = self.in_proj.bias
        return F.linear(x, self.in_proj.weight[rows], None if bias is None else bias[rows])

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}, dropout={self.dropout}"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    batch_first: bool,
    dropout: float,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention on projected q, k, v, in the layout the module was given; weights if needed."""
    batched = q.dim() == 3
    if not batched:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, h, L, d)
    mask = _merge_masks(q, k, key_padding_mask, attn_mask)
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = weights @ v
        weights = weights.mean(1) if average else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = out.transpose(1, 2).flatten(2)  # (N, L, E)
    if not batched:
        return out[0], None if weights is None else weights[0]
    return (out if batch_first else out.transpose(0, 1)), weights


# A traced model calls this as one function: what it does depends on the masks' shapes.
torch.fx.wrap("_attend")


def _merge_masks(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:
    """One additive mask that broadcasts to (N, h, L, S), or None. True means "do not attend"."""
    batch, heads, length, _ = q.shape
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, q.dtype)
        if merged.dim() == 3:
            merged = merged.view(batch, heads, length, -1)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
