"""Feedback in the weights' own structure: B = B_U diag(B_S) B_Vᵀ, from classes to features.

One matrix serves both ways: as a read-out, features (N, D) to logits (N, C), and as feedback,
errors (N, C) to features' errors (N, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converter.decompose import Factors
from trainers.losses import cross_entropy, output_error


class StructuredFeedback(nn.Module):
    """B (D, C) of rank k with orthonormal B_U (D, k), B_V (C, k), and B_S (k,); bias b (C,).

    Args:
        factors: B's.
        bias: (C,), the read-out's.
        learned: whether B and b are parameters, learned locally, or fixed buffers.
    """

    def __init__(self, factors: Factors, bias: Tensor, learned: bool) -> None:
        super().__init__()
        values = {"B_U": factors.U, "B_S": factors.S, "B_V": factors.V, "bias": bias}
        for name, value in values.items():
            if learned:
                setattr(self, name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value.clone())
        self.learned = learned

    @property
    def subspace(self) -> Tensor:
        """B_U (D, k)."""
        return self.B_U

    def forward(self, z: Tensor) -> Tensor:
        """Read-out: z (N, D) to logits z B + b (N, C)."""
        return F.linear(z @ self.B_U * self.B_S, self.B_V, self.bias)

    def back(self, error: Tensor) -> Tensor:
        """Feedback: errors (N, C) to e Bᵀ (N, D)."""
        return F.linear(error @ self.B_V * self.B_S, self.B_U)

    def local_loss(self, z: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of the read-out: at z its gradient is B (softmax(z B + b) − y) / N."""
        return cross_entropy(self(z), y, label_smoothing)

    def global_loss(
        self, z: Tensor, error: Tensor, y: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """⟨z, B e⟩ / N for the output's error e (N, C); a learned B learns as a read-out of z."""
        loss = inner(z, self.back(error))
        if self.learned:
            loss = loss + self.local_loss(z.detach(), y, label_smoothing)
        return loss


class KolenPollack(nn.Module):
    """A pair of matrices that see the same updates and both decay, so that they come to agree.

    Kolen & Pollack 1994, as Akrout et al. 2019 (arXiv 1904.05391) use it. With a local error, a
    read-out learns forward and B carries its error back; with the global error B alone learns,
    from features and output error (direct Kolen–Pollack, Webster et al. 2021, arXiv 2012.14325).

    The two share a fixed B_V (C, k), and each holds B_U diag(B_S) as one matrix (D, k): factors
    that each multiply the other's update would not see the same one, and drift apart.

    Args:
        factors: the first B, and the shared B_V.
        read: the read-out's first B_U diag(B_S) (D, k); None for the global error.
        decay: coefficient of ‖·‖²/2 of each matrix.
    """

    def __init__(self, factors: Factors, read: Tensor | None = None, decay: float = 1e-3) -> None:
        super().__init__()
        self.sent = nn.Parameter(factors.U * factors.S)
        self.register_parameter("read", None if read is None else nn.Parameter(read.clone()))
        bias = None if read is None else nn.Parameter(read.new_zeros(len(factors.V)))
        self.register_parameter("bias", bias)
        self.register_buffer("B_V", factors.V.clone())
        self.decay = decay

    @property
    def subspace(self) -> Tensor:
        """The basis (D, k) of what B sends back, as it was drawn; orthonormal until it learns."""
        return self.sent

    def back(self, error: Tensor) -> Tensor:
        """Feedback: errors (N, C) to e Bᵀ (N, D)."""
        return F.linear(error @ self.B_V, self.sent)

    def forward(self, z: Tensor) -> Tensor:
        """Read-out: z (N, D) to logits (N, C); there is none with the global error."""
        return F.linear(z @ self.read, self.B_V, self.bias)

    def local_loss(self, z: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The read-out's cross-entropy, its error carried to z by B instead of the read-out."""
        logits = self(z.detach())
        error = output_error(logits.detach(), y, label_smoothing)
        loss = cross_entropy(logits, y, label_smoothing) + self._shrinking(self.read)
        return loss + self.global_loss(z, error, y)

    def global_loss(
        self, z: Tensor, error: Tensor, y: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """⟨z, B e⟩ / N, and B's own update zᵀ e / N from features and error."""
        update = inner(z.detach() @ self.sent, error @ self.B_V)
        return inner(z, self.back(error)) + update + self._shrinking(self.sent)

    def _shrinking(self, matrix: Tensor) -> Tensor:
        return matrix.square().sum() * (self.decay / 2)


class DenseFeedback(nn.Module):
    """A dense random B (D, C), fixed: direct feedback alignment's (Nøkland 2016).

    Args:
        features: D.
        num_classes: C.
        generator: draws B from N(0, 1/C), so that feedback has the error's scale.
    """

    def __init__(self, features: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        B = torch.randn(features, num_classes, generator=generator) / num_classes**0.5
        self.register_buffer("B", B)

    def back(self, error: Tensor) -> Tensor:
        """Feedback: errors (N, C) to e Bᵀ (N, D)."""
        return F.linear(error, self.B)

    def global_loss(
        self, z: Tensor, error: Tensor, y: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """⟨z, B e⟩ / N for the output's error e (N, C)."""
        return inner(z, self.back(error))


def inner(z: Tensor, signal: Tensor) -> Tensor:
    """⟨z, signal⟩ / N, (N, D) each: a loss whose gradient at z is signal / N."""
    return (z.float() * signal.detach().float()).sum() / len(z)


def random_factors(
    features: int, num_classes: int, rank: int, generator: torch.Generator
) -> Factors:
    """Orthonormal B_U (D, k) and B_V (C, k) drawn by QR, and B_S = 1; k is `rank` or what fits."""
    rank = min(rank, features, num_classes)
    U = _orthonormal(features, rank, generator)
    V = _orthonormal(num_classes, rank, generator)
    return Factors(U, torch.ones(rank), V)


def fitted_factors(
    z: Tensor, logits: Tensor, rank: int, ridge: float = 1e-2
) -> tuple[Factors, Tensor]:
    """B and b of the ridge regression of logits (N, C) on features z (N, D), cut to rank k.

    Args:
        z: (N, D).
        logits: (N, C), of which the mean over classes is left out.
        rank: k.
        ridge: relative to the mean variance of the features, summed over the batch.

    Returns:
        B, next to 0 where the features are the same for all images, and b, then the mean logits.
    """
    z, logits = z.float(), logits.float()
    logits = logits - logits.mean(dim=1, keepdim=True)
    z_mean, logits_mean = z.mean(dim=0), logits.mean(dim=0)
    zc, lc = z - z_mean, logits - logits_mean
    # The dual form: N is often smaller than D.
    gram = zc @ zc.mT
    # Below this the features vary by rounding alone, or not at all: nothing is to be read from it.
    least = torch.finfo(gram.dtype).eps * z.square().sum(dim=1).mean().clamp_min(1e-20)
    scale = gram.diagonal().mean().clamp_min(least)
    gram = gram + ridge * len(z) * scale * torch.eye(len(z), device=z.device)
    B = zc.mT @ torch.linalg.solve(gram, lc)
    U, S, Vh = torch.linalg.svd(B, full_matrices=False)
    rank = min(rank, len(S))
    factors = Factors(U[:, :rank], S[:rank], Vh[:rank].mT)
    return factors, logits_mean - z_mean @ factors.matrix()


def kernel_directions(directions: Tensor, rows: int) -> Tensor:
    """Channel directions (C, k) as a subspace of U's rows: (C·taps, k), each tap alike."""
    taps = rows // directions.shape[0]
    return directions.repeat_interleave(taps, dim=0) / taps**0.5


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
