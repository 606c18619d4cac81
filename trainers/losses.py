"""The terms of the local losses: pure functions of tensors, each a 0-d tensor to be minimised.

Products run in autocast's precision where that is on; means and norms in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.device import wide


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (N, C) with y, (N,) indices or (N, C) probabilities."""
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def probabilities(y: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Targets (N, C) float32 from (N,) indices or (N, C) probabilities, smoothed."""
    if y.ndim == 1:
        y = F.one_hot(y, num_classes)
    y = wide(y if y.is_floating_point() else y.float())
    return y * (1 - label_smoothing) + label_smoothing / num_classes if label_smoothing else y


def output_error(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """e = softmax(logits) − target, (N, C): N times the gradient of the mean cross-entropy."""
    return wide(logits).softmax(-1) - probabilities(y, logits.shape[-1], label_smoothing)


def similarity_target(y: Tensor, num_classes: int) -> Tensor:
    """Y Yᵀ (N, N) of one-hot labels (or of class probabilities), shared by all blocks of a step."""
    Y = probabilities(y, num_classes)
    return Y @ Y.mT


def similarity_matching(z: Tensor, target: Tensor) -> Tensor:
    """mean[(ẑẑᵀ − target)²] with ẑ the batch-centred rows of z (N, D), scaled to unit length.

    Nøkland & Eidnes 2019 (arXiv 1901.06656), section 2.1; their convolution, where there is one, is
    a part of the features (`trainers.readout`).

    Args:
        z: (N, D) features.
        target: (N, N), from `similarity_target`.
    """
    z = wide(z)
    z = F.normalize(z - z.mean(dim=0), dim=1)
    return F.mse_loss(wide(z @ z.mT), target)


def distillation(h: Tensor, target: Tensor, variance: Tensor | None = None) -> Tensor:
    """mean[(h − target)²] / var(target): 0 when equal, 1 for the best constant. Any one shape.

    Args:
        variance: 0-d, of all targets where these are a share of them; by default these targets'.
    """
    h, target = wide(h), wide(target)
    variance = target.var() if variance is None else variance
    return F.mse_loss(h, target) / variance.clamp_min(torch.finfo(target.dtype).tiny)


def alignment(U: Tensor, directions: Tensor) -> Tensor:
    """1 − ‖Uᵀ P‖² / min(r, k): 0 when U's span holds P's (or P's holds U's), 1 when orthogonal.

    Args:
        U: (m, r) with orthonormal columns.
        directions: P (m, k), orthonormal columns: the feedback's subspace.
    """
    overlap = wide(U.mT @ directions).square().sum()
    return 1 - overlap / min(U.shape[-1], directions.shape[-1])


def orthogonality(U: Tensor) -> Tensor:
    """‖UᵀU − I‖²_F, of U (..., m, r), summed over leading axes."""
    gram = wide(U.mT @ U)
    return (gram - torch.eye(U.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum()


def cosine(z: Tensor, feedback: Tensor) -> Tensor:
    """Mean of 1 − cos(zᵢ, feedbackᵢ) over rows of (N, D): 0 when the output points where it should.

    `feedback` is B applied to the target: what the block's output would be moved towards.
    """
    return 1 - F.cosine_similarity(wide(z), wide(feedback), dim=1).mean()


def hoyer(S: Tensor) -> Tensor:
    """(‖S‖₁/‖S‖₂ − 1) / (√r − 1): 0 for one nonzero value, 1 for all equal (Hoyer 2004, reversed).

    Args:
        S: (..., r); leading axes are averaged over. 0 where r is 1.
    """
    S = wide(S)
    rank = S.shape[-1]
    if rank == 1:
        return S.sum() * 0
    ratio = S.abs().sum(-1) / S.norm(dim=-1).clamp_min(torch.finfo(S.dtype).tiny)
    return ((ratio - 1) / (rank**0.5 - 1)).mean()
