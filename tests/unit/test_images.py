import numpy as np
import pytest
import torch

from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.data.decode import Target, fit
from diffusion.data.values import to_uint8
from diffusion.run.grids import grid, grid_columns, save_grid


def test_levels_come_back_as_they_were_read():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_a_grid_shows_each_image_in_its_place(channels, mode):
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, channels, 8, 8) * 40
    sheet = grid(images, columns=3)
    assert sheet.mode == mode
    array = np.asarray(sheet).reshape(sheet.height, sheet.width, channels)
    tile = (sheet.width - 2) // 3
    middles = [array[2 + tile // 2 + (i // 3) * tile, 2 + tile // 2 + (i % 3) * tile, 0] for i in range(6)]
    assert middles == [40, 80, 120, 160, 200, 255]  # the empty place is white
    assert (array[0] == 255).all()


def test_other_numbers_of_channels_lie_side_by_side():
    images = torch.arange(7, dtype=torch.uint8).view(1, 7, 1, 1).expand(2, 7, 64, 64) * 30
    sheet = np.asarray(grid(images, columns=1))
    assert [sheet[32, 32 + i * 65] for i in range(7)] == [0, 30, 60, 90, 120, 150, 180]


def test_classes_make_columns():
    assert grid_columns(100, 10) == 10
    assert grid_columns(16, 0) == 4
    assert grid_columns(17, 1000) == 5
    assert grid_columns(100, 3) == 9
    assert grid_columns(4, 10) == 10


def test_a_picture_is_whole_or_absent(tmp_path):
    save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_latents_may_lie_beyond_their_range():
    """Whatever their size becomes; what float32 does not hold is refused."""
    latents = 8 * np.random.default_rng(0).standard_normal((8, 8, 4)).astype(np.float32)
    for size in (8, 16):
        target = Target((size, size), 4, (-5.5, 5.5), unbounded=True)
        fitted = fit(latents, target)
        assert abs(fitted).max() > 1.5
    np.testing.assert_allclose(
        fit(latents, Target((8, 8), 4, (-5.5, 5.5), True)), latents.transpose(2, 0, 1) / 5.5, rtol=1e-5
    )
    for bad in (1e300, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"are not within data.range"):
            fit(latents.astype(np.float64) * bad, Target((8, 8), 4, (-5.5, 5.5), unbounded=True))
    with pytest.raises(ValueError, match=r"are not within data.range"):
        fit(latents, Target((8, 8), 4, (-5.5, 5.5)))


@pytest.mark.parametrize(
    ("data", "sample", "says"),
    [
        ({"range": [-5, 5]}, {"clip_denoised": False}, "data.range is .-5, 5.; with data.unbounded, it must"),
        ({}, {"clip_denoised": False}, "data.range is None; with data.unbounded"),
        ({"range": [-5.5, 5.5]}, {}, "sample.clip_denoised is true, and data.unbounded too"),
    ],
)
def test_latents_are_neither_rounded_nor_cut(data, sample, says):
    with pytest.raises(UsageError, match=says):
        config_of(
            {"data": {"source": "folder", "unbounded": True} | data, "sample": sample, "model": {"class_cond": False}}
        )
