"""What pictures are like: each figure recovers what was planted."""

import pytest
import torch

from burnish.traits import diversity, roughness, saturation, sharpness


def noise(level: float, *shape: int, seed: int = 0) -> torch.Tensor:
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", [0.02, 0.1])
def test_roughness_recovers_the_noise_and_hardly_sees_edges(level: float) -> None:
    flat = 0.5 + noise(level, 4, 3, 64, 64)
    # The mean of nine takes a ninth of the variance with it.
    expected = level * (8 / 9) ** 0.5
    assert roughness(flat).mean() == pytest.approx(expected, rel=0.03)
    edges = flat.clone()
    edges[:, :, 20:40, 20:40] += 0.4
    assert roughness(edges).mean() == pytest.approx(expected, rel=0.15)


def test_diversity_is_the_distance_of_two_and_nothing_for_copies() -> None:
    groups = noise(0.1, 5, 8, 3, 32, 32)
    pairs = (groups[:, :, None] - groups[:, None]).pow(2).mean(dim=(3, 4, 5))
    apart = pairs.sum(dim=(1, 2)) / (8 * 7)
    torch.testing.assert_close(diversity(groups), apart.sqrt(), rtol=1e-4, atol=0)
    assert diversity(groups[:, :1].expand(-1, 8, -1, -1, -1)).max() < 1e-6


def test_sharpness_grows_with_contrast_and_falls_with_blur() -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert sharpness(0.5 * picture) == pytest.approx(float(0.5 * sharpness(picture)))
    blurred = torch.nn.functional.avg_pool2d(picture, 3, stride=1, padding=1)
    assert float(sharpness(blurred)) < 0.5 * float(sharpness(picture))


def test_saturation_is_nothing_for_grey_and_falls_with_it() -> None:
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    grey = picture.mean(dim=1, keepdim=True).expand_as(picture)
    assert saturation(grey).max() == 0
    torch.testing.assert_close(saturation((picture + grey) / 2), saturation(picture) / 2)
