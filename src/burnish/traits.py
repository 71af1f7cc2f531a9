"""What pictures are like, whatever they show: figures that move when a policy cheats its reward.

None of them is a reward. A policy that sharpens, saturates or roughens everything, or draws one
picture for every seed, has found what its judge can be talked into.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Pictures = Float[Tensor, "picture 3 height width"]
"""RGB in [0, 1]."""


def sharpness(pictures: Pictures) -> Float[Tensor, " picture"]:
    """Mean absolute Laplacian of the brightness, in units of the pixels.

    >>> sharpness(torch.full((1, 3, 8, 8), 0.4)).round(decimals=4)
    tensor([0.])
    """
    centre = functional.pad(pictures.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    around = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).to(centre)
    return functional.conv2d(centre, around[None, None]).abs().mean(dim=(1, 2, 3))


def saturation(pictures: Pictures) -> Float[Tensor, " picture"]:
    """Mean distance of the largest and the smallest channel, 0 for grey.

    >>> saturation(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4))
    tensor([1.])
    """
    return (pictures.amax(dim=1) - pictures.amin(dim=1)).mean(dim=(1, 2))


def roughness(pictures: Pictures) -> Float[Tensor, " picture"]:
    """Median absolute difference to the mean of the nine pixels around, the standard estimate of
    noise: edges are rare, so they do not move a median.

    >>> roughness(torch.full((1, 3, 8, 8), 0.4)).round(decimals=4)
    tensor([0.])
    """
    around = functional.avg_pool2d(
        functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    # 0.6745 is the median absolute value of a standard normal number.
    return (pictures - around).abs().flatten(1).median(dim=1).values / 0.6745


def diversity(groups: Float[Tensor, "group member 3 height width"]) -> Float[Tensor, " group"]:
    """Root mean squared difference between two members of a group, in units of the pixels.

    >>> diversity(torch.zeros(1, 4, 3, 8, 8))
    tensor([0.])
    """
    count = groups.shape[1]
    # The mean over ordered pairs of two members, from the spread around their mean.
    spread = groups.var(dim=1, correction=0).mean(dim=(1, 2, 3))
    return (2 * spread * count / max(count - 1, 1)).sqrt()


def groups(pictures: Sequence[Tensor], count: int) -> list[Float[Tensor, "1 member 3 _ _"]]:
    """Each `count` pictures that follow one another, and have one size, as a group."""
    starts = range(0, len(pictures), count)
    return [torch.stack(list(pictures[start : start + count]))[None] for start in starts]
