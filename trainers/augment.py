"""Random changes to images, each drawn from (seed, epoch, index) alone.

So an image is augmented the same whatever batch, process or run it is drawn in, and a resumed run
sees what an uninterrupted one would have seen.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from converter.specs import InputSpec

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, epoch: int, indices: Tensor, draws: int) -> Tensor:
    """Numbers in [0, 1) that depend on nothing but their coordinates.

    SplitMix64 (Steele, Lea and Flood 2014) used as a hash of (seed, epoch, index, draw).

    Args:
        indices: (N,) int64.
        draws: how many numbers for each index.

    Returns:
        (N, draws) float64.
    """
    key = _hash(_hash(torch.tensor(seed)) + epoch)
    rows = _hash(key + indices.to(torch.int64))
    bits = _hash(rows[:, None] + torch.arange(draws))
    return ((bits >> 11) & (2**53 - 1)).double() / 2**53


def shift_and_flip(
    images: Tensor, randomness: Tensor, *, shift: int, flip: bool, fill: int = 0
) -> Tensor:
    """Shift each image by up to `shift` pixels along both axes and mirror half of them.

    Args:
        images: (N, C, H, W), any dtype.
        randomness: (N, 3) in [0, 1): for the rows, the columns, the mirroring.
        fill: the value that moves in.

    Returns:
        (N, C, H, W): the same as a random crop after padding by `shift`.
    """
    count, channels, height, width = images.shape
    offsets = (randomness[:, :2] * (2 * shift + 1)).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    if flip:
        columns = torch.where(randomness[:, 2:] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (shift,) * 4, value=fill)
    pixels = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    pixels = pixels[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(count, channels, height, width)


def crop_for_training(spec: InputSpec, *, flip: bool) -> Callable[[Tensor], Tensor]:
    """Random resized crop and mirroring, as for ImageNet, of one uint8 image (C, H, W)."""
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(spec.shape[1:], interpolation=_mode(spec), antialias=True)
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def crop_for_testing(spec: InputSpec) -> Callable[[Tensor], Tensor]:
    """Resize and centre crop, as the specification says, of one uint8 image (C, H, W).

    Without a size to resize to, as much of the image is kept as the crop's proportions allow.
    """
    mode, crop = _mode(spec), list(spec.shape[1:])

    def fit(image: Tensor) -> Tensor:
        size = [spec.resize] if spec.resize else _covering(image.shape[1:], crop)
        resized = v2.functional.resize(image, size, interpolation=mode, antialias=True)
        return v2.functional.center_crop(resized, crop)

    return fit


def seeded(
    change: Callable[[Tensor], Tensor], image: Tensor, seed: int, epoch: int, index: int
) -> Tensor:
    """`change(image)` with torch's random state set by the coordinates, and restored after."""
    draw = uniform(seed, epoch, torch.tensor([index]), 1).item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draw * 2**53))
        return change(image)


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 (N, C, H, W) or (C, H, W) to float32, scaled to 0..1, less the mean, over the std."""
    mean = torch.tensor(spec.mean).view(-1, 1, 1)
    std = torch.tensor(spec.std).view(-1, 1, 1)
    return images.float().mul_(1 / 255).sub_(mean).div_(std)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 with wrap-around."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX[0]
    x = (x ^ _shift_right(x, 27)) * _MIX[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _covering(sides: Sequence[int], crop: Sequence[int]) -> list[int]:
    """The least height and width in the proportions of `sides` that leave nothing of `crop` bare.

    The longer one is rounded down, as torchvision does where it is told the shorter.
    """
    (height, width), (rows, columns) = sides, crop
    if rows * width >= columns * height:
        return [rows, rows * width // height]
    return [columns * height // width, columns]


def _mode(spec: InputSpec) -> v2.InterpolationMode:
    return v2.InterpolationMode(spec.interpolation)
