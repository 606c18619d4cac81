"""What a layer sees and gives on real images, as rows at a few sampled positions of each image."""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converter.factors import Factored, FactoredLinear

Convolution = nn.modules.conv._ConvNd


def positions(name: str, images: int, places: int, wanted: int) -> Tensor:
    """Sampled places (images, min(wanted, places)) of a layer's output map, int64.

    The same for the same layer in every pass, so that rows of two networks belong together.
    """
    if wanted >= places:
        return torch.arange(places).expand(images, -1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(images, places, generator=generator).topk(wanted).indices


def is_linear(module: nn.Module) -> bool:
    """Whether the layer works on the last axis; else it is a convolution."""
    return isinstance(module, nn.Linear | FactoredLinear)


def channel_axis(module: nn.Module) -> int:
    """Of the layer's output: maps and sequences have their channels second, tokens last."""
    return -1 if is_linear(module) else 1


def places(module: nn.Module, output: Tensor, images: int) -> int:
    """Output positions of one image: pixels of a map, or tokens."""
    if is_linear(module):
        return output.numel() // output.shape[-1] // images
    return output[0, 0].numel()


def output_rows(module: nn.Module, y: Tensor, at: Tensor) -> Tensor:
    """The outputs (images·P, m) at the sampled positions `at` (images, P)."""
    if is_linear(module):
        return _tokens(y, at)
    index = at.to(y.device).unsqueeze(1).expand(-1, y.shape[1], -1)
    return y.flatten(2).gather(2, index).mT.reshape(-1, y.shape[1])


def input_rows(module: nn.Module, x: Tensor, output_size: tuple[int, ...], at: Tensor) -> Tensor:
    """What the layer multiplies its flattened weight (N, C·K) with: rows (images·P, C·K).

    Args:
        module: dense or factored, linear or an ungrouped convolution.
        x: its input.
        output_size: spatial size of its output; empty for a linear layer.
        at: (images, P) positions in the flattened output.
    """
    if is_linear(module):
        return _tokens(x, at)
    x, output_size = _as_map(x), (1, *output_size)[-2:]
    (up, left), (down, right) = _margins(module, x)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, (left, right, up, down), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = (
        _pair(v) for v in (module.kernel_size, module.stride, module.dilation)
    )
    at = at.to(x.device)
    corner = at // output_size[1] * sh * x.shape[3] + at % output_size[1] * sw
    flat = x.flatten(2)
    rows = x.new_empty(*at.shape, x.shape[1], kh, kw)
    for i in range(kh):
        for j in range(kw):
            index = (corner + i * dh * x.shape[3] + j * dw).unsqueeze(1)
            rows[..., i, j] = flat.gather(2, index.expand(-1, x.shape[1], -1)).mT
    return rows.reshape(-1, x.shape[1] * kh * kw)


def column_rows(rows: Tensor, scheme: str | None, last_tap: int) -> Tensor:
    """Input rows (R, C·K) as the columns of the scheme's matrix see them: (R', n).

    In the spatial scheme the first convolution passes over each of the kernel's last taps.
    """
    if scheme != "spatial":
        return rows
    return rows.unflatten(1, (-1, last_tap)).mT.reshape(-1, rows.shape[1] // last_tap)


def column_moment(moment: Tensor, scheme: str | None, last_tap: int) -> Tensor:
    """The second moment (C·K, C·K) of input rows as that of `column_rows`: (n, n)."""
    if scheme != "spatial":
        return moment
    n = moment.shape[0] // last_tap
    taps = moment.reshape(n, last_tap, n, last_tap).diagonal(dim1=1, dim2=3)
    return taps.mean(-1)


def last_tap(module: nn.Module) -> int:
    """Length of the kernel's last axis; 1 for a linear layer."""
    return 1 if is_linear(module) else module.kernel_size[-1]


def can_sample(module: nn.Module) -> bool:
    """Whether the rows of this layer are known how to take: grouped convolutions' aren't."""
    if isinstance(module, Factored | nn.Linear | Convolution):
        return getattr(module, "groups", 1) == 1
    return False


def _tokens(x: Tensor, at: Tensor) -> Tensor:
    width = x.shape[-1]
    index = at.to(x.device).unsqueeze(-1).expand(-1, -1, width)
    return x.reshape(len(at), -1, width).gather(1, index).reshape(-1, width)


def _as_map(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.ndim == 3 else x


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return (1, *values)[-2:]


def _margins(module: nn.Module, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """((up, left), (down, right)) that the convolution pads with."""
    if module.padding == "valid":
        return (0, 0), (0, 0)
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    if module.padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before = [w // 2 for w in whole]
        return tuple(before), tuple(w - b for w, b in zip(whole, before, strict=True))
    padding = tuple(module.padding)
    both = (0, *padding)[-2:]
    return both, both
