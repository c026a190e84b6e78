import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import UsageError
from diffusion.pictures import grid, grid_columns, read_grid, save_grid, to_uint8


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
    save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "new" / "a.png", 1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (7, 3, 16, 12), (1, 4, 64, 64), (3, 2, 100, 100), (3, 5, 4, 4)])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_grid_gives_its_images_back(shape, columns, tmp_path):
    images = torch.randint(256, shape, dtype=torch.uint8)
    for labels in (None, list(range(shape[0]))):
        save_grid(images, tmp_path / "a.png", columns, labels)
        back, said = read_grid(tmp_path / "a.png")
        assert torch.equal(back, images)
        assert said == labels


@pytest.mark.parametrize("change", ["mode", "cut", "number", "nonsense", "broken", "bomb"])
def test_a_grid_that_was_changed_is_refused(change, tmp_path):
    save_grid(torch.zeros(12, 1, 4, 4, dtype=torch.uint8), tmp_path / "a.png", 4)
    with Image.open(tmp_path / "a.png") as image:
        text = image.info["tiles"]
        image.load()
    tiles = PngInfo()
    tiles.add_text("tiles", {"number": text.replace("12", "13"), "nonsense": "[12, 1, 0, 0]"}.get(change, text))
    if change == "mode":
        image = image.convert("RGB")
    elif change == "cut":
        image = image.crop((0, 0, 100, 100))
    elif change == "bomb":
        image = Image.new("L", (10_000, 10_000))
    image.save(tmp_path / "a.png", pnginfo=tiles)
    if change == "broken":
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60] + b"x" * 60)
    with pytest.raises(UsageError, match=r"a\.png cannot be read as a grid"):
        read_grid(tmp_path / "a.png")


def test_a_picture_of_something_else_is_no_grid(tmp_path):
    grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    assert [read_grid(tmp_path / name) for name in ("a.png", "b.png", "c.png")] == [None] * 3
