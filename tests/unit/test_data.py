import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image

from diffusion import UsageError
from diffusion.data.base import ArrayDataset, load, open_data
from diffusion.data.decode import Target, preprocess
from diffusion.data.loader import batch_indices, step_batches
from diffusion.data.sources import SOURCES
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.torchvision import MNIST
from diffusion.data.values import to_uint8, to_x_start

REAL_DATA = os.environ.get("DIFFUSION_TEST_DATA")
"""A folder that holds MNIST/raw as torchvision stores it; tests that need it are skipped without."""


def picture(path, size=(40, 30), colour=(200, 30, 90), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def folder(path, image_size=8, channels=3):
    return Folder(path=str(path), image_size=image_size, channels=channels).open()


@pytest.mark.parametrize("name", ["48x40", "130x77", "33x32"])
def test_preprocessing_is_the_published_one(name):
    figures = golden("preprocessing.npz")
    ours = preprocess(Image.fromarray(figures[f"input_{name}"]), Target((32, 32), 3))
    np.testing.assert_array_equal(ours.astype(np.float32) / 127.5 - 1, figures[f"output_{name}"])


def test_digits_are_the_shipped_ones():
    data = Digits().open()
    images, labels, *_ = load(data, [0, 1796])
    assert (len(data), images.shape, images.dtype) == (1797, (2, 1, 8, 8), torch.uint8)
    assert labels.tolist() == [0, 8]
    assert data.class_names == tuple("0123456789")
    assert data.images.max() == 255


def test_digits_come_in_any_size_and_colour():
    data = Digits(image_size=16, channels=3).open()
    assert data.images.shape == (1797, 3, 16, 16)
    assert torch.equal(data.images[:, 0], data.images[:, 2])


@pytest.mark.skipif(not REAL_DATA, reason="DIFFUSION_TEST_DATA is not set")
def test_mnist_is_read_where_it_lies():
    data = MNIST(path=f"{REAL_DATA}/MNIST", image_size=28).open("test")
    assert torch.equal(data.images, MNIST(path=REAL_DATA, image_size=28).open("test").images)
    assert (len(data), data.images.shape[1:], data.labels[:5].tolist()) == (10000, (1, 28, 28), [7, 2, 1, 0, 4])


def test_class_folders_make_classes(tmp_path):
    picture(tmp_path / "dog/b.png")
    picture(tmp_path / "cat/deep/a.JPG")
    data = folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]
    assert data.images.shape == (2, 3, 8, 8)


def test_links_to_folders_are_followed_once(tmp_path):
    picture(tmp_path / "elsewhere/b.png")
    picture(tmp_path / "data/cat/a.png")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/loop").symlink_to(tmp_path / "data")
    data = folder(tmp_path / "data")
    assert data.class_names == ("cat", "dog")
    assert len(data) == 2


def test_a_strip_is_refused_before_it_fills_the_memory(tmp_path):
    picture(tmp_path / "strip.png", size=(20000, 3))
    with pytest.raises(UsageError, match=r"strip\.png .*its sides 20000 and 3 are too unequal"):
        folder(tmp_path)


def test_a_folder_without_class_folders_has_no_classes(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "more/b.png")
    assert folder(tmp_path).class_names == ()
    assert len(folder(tmp_path)) == 2


def test_palette_images_become_colours_before_they_are_resized(tmp_path):
    red_and_blue = Image.fromarray(np.repeat([[[255, 0, 0], [0, 0, 255]]], 64, 0).repeat(32, 1).astype(np.uint8))
    red_and_blue.save(tmp_path / "rgb.png")
    red_and_blue.convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(*folder(tmp_path).images)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_every_kind_of_colour_is_one_setting(tmp_path, channels, mode):
    picture(tmp_path / "a.png", mode=mode)
    assert folder(tmp_path, channels=channels).images.shape == (1, channels, 8, 8)


def test_any_number_of_channels_comes_from_npy(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 7)).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(folder(tmp_path, channels=7).images[0], array.transpose(2, 0, 1))


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "a.png")
    images = folder(tmp_path, channels=1).images
    assert images.dtype == torch.float32
    assert torch.allclose(images, torch.tensor(40000 / 65535 * 2 - 1), atol=1e-7)


def broken(path, content):
    path.write_bytes(content)
    return path


def test_a_file_that_is_no_image_is_named(tmp_path):
    whole = picture(tmp_path / "whole.png", size=(300, 300), colour=(1, 2, 3)).read_bytes()
    for name, content in {
        "empty.png": b"",
        "text.jpg": b"hello",
        "cut.png": whole[:-200],
        "x.npy": b"\x93NUMPY",
    }.items():
        path = broken(tmp_path / name, content)
        with pytest.raises(UsageError, match=f"{name} cannot be read as an image") as caught:
            folder(tmp_path)
        assert "\n" not in str(caught.value)
        path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_named_too(tmp_path, workers):
    for i in range(7):
        picture(tmp_path / f"{i}.png")
    broken(tmp_path / "bad.png", b"no")
    lazy = Folder(path=str(tmp_path), image_size=8).list_files()
    with pytest.raises(UsageError, match=r"bad\.png cannot be read as an image") as caught:
        list(step_batches(lazy, 4, 0, range(2), [slice(0, 4)], workers))
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"a\.npy cannot be read"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "nowhere", "nowhere is not there"),
        (lambda path: broken(path / "file", b""), "file is not a folder"),
        (lambda path: path, "holds no images"),
    ],
)
def test_where_there_is_no_data_it_says_so(tmp_path, make, says):
    with pytest.raises(UsageError, match=says):
        folder(make(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_path_without_the_data_set_says_so(tmp_path, name):
    with pytest.raises(UsageError, match=f"{tmp_path} does not hold torchvision's {name}") as caught:
        SOURCES[name](path=str(tmp_path)).open()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- order: a function of seed and step --------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch():
    seen = [i for step in range(10) for i in batch_indices(25, 10, seed=0, step=step)]
    for epoch in range(4):
        assert sorted(seen[25 * epoch : 25 * (epoch + 1)]) == list(range(25))
    assert seen[:25] != seen[25:50]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_indices(5, 10, seed=0, step=3)) == sorted(2 * list(range(5)))


def test_the_order_does_not_depend_on_how_one_got_there():
    straight = [batch_indices(100, 16, 3, step) for step in range(20)]
    assert [batch_indices(100, 16, 3, step) for step in reversed(range(20))] == straight[::-1]
    assert batch_indices(100, 16, 4, 0) != straight[0]


def test_processes_and_micro_batches_share_out_the_same_images():
    data = Digits().open()

    def of(parts):
        return [images for images, *_ in step_batches(data, 8, 0, range(3, 6), parts)]

    whole = of([slice(0, 8)])
    halves = of([slice(0, 4), slice(4, 8)])
    ranks = [of([slice(0, 4)]), of([slice(4, 8)])]
    swapped = of([slice(4, 8), slice(0, 4)])
    for step in range(3):
        assert torch.equal(halves[step], whole[step])
        assert torch.equal(swapped[step], torch.cat([whole[step][4:], whole[step][:4]]))
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), whole[step])


def test_reading_data_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    list(step_batches(Digits().open(), 8, 0, range(2), [slice(0, 8)]))
    assert torch.equal(torch.rand(1), expected)


# --- odd files --------------------------------------------------------------------------------------------------------

RED = (200, 40, 10)
GREY = round(0.299 * 200 + 0.587 * 40 + 0.114 * 10)


def red(mode="RGB", size=(16, 12)):
    return Image.new("RGB", size, RED).convert(mode)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def upside(path):
    """A picture that is blue at the top as a viewer shows it, and on the right as its pixels lie."""
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[:, 6:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 8  # turn by 90 degrees, counter-clockwise
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def noise(path, keep=None, flip=None):
    """A PNG of noise, cut off or with a bit changed."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes()[:keep])
    if flip is not None:
        content[flip] ^= 4
    path.write_bytes(content)
    return path


def array(path, *shape, dtype=np.uint8):
    np.save(path, np.full(shape, 7, dtype))
    return path


def huge(path):
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    content = bytearray(saved(red(), path).read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return path


def pipe(path):
    os.mkfifo(path)
    return path


def link(path, target):
    path.symlink_to(target)
    return path


def unreadable(path):
    saved(red(), path).chmod(0)
    return path


RIGHT = {  # read as they should be: colour in the middle, as RGB
    "1 pixel": (lambda d: saved(red(size=(1, 1)), d / "a.png"), RED),
    "grey": (lambda d: saved(red("L"), d / "a.png"), (GREY,) * 3),
    "palette": (lambda d: saved(red().quantize(4), d / "a.png"), RED),
    "palette, transparent": (lambda d: saved(red().quantize(4), d / "a.png", transparency=3), RED),
    "bilevel": (lambda d: saved(Image.new("1", (9, 9), 1), d / "a.png"), (255,) * 3),
    "alpha": (lambda d: saved(red("RGBA"), d / "a.png"), RED),
    "grey and alpha": (lambda d: saved(red("LA"), d / "a.png"), (GREY,) * 3),
    "16 bits, grey": (lambda d: saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), d / "a.png"), (156,) * 3),
    "16 bits, tiff": (lambda d: saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), d / "a.tif"), (156,) * 3),
    "jpeg": (lambda d: saved(red(), d / "a.JPEG", quality=100), RED),
    "cmyk jpeg": (lambda d: saved(red("CMYK"), d / "a.jpg", quality=100), RED),
    "progressive jpeg": (lambda d: saved(red(), d / "a.jpg", quality=100, progressive=True), RED),
    "animated gif": (lambda d: saved(red(), d / "a.gif", save_all=True, append_images=[red("L")]), RED),
    "animated webp": (lambda d: saved(red(), d / "a.webp", lossless=True, save_all=True, append_images=[red()]), RED),
    "tiff with a thumbnail": (
        lambda d: saved(red(), d / "a.tiff", save_all=True, append_images=[red(size=(4, 3))]),
        RED,
    ),
    "bmp": (lambda d: saved(red(), d / "a.bmp"), RED),
    "interlaced or not": (lambda d: saved(red(), d / "a.png", optimize=True), RED),
    "a png named .jpg": (lambda d: saved(red(), d / "a.jpg", format="PNG"), RED),
    "a name that is not UTF-8": (lambda d: saved(red(), Path(os.fsdecode(bytes(d / "a") + b"\xff\xfe.png"))), RED),
    "a name with a line break": (lambda d: saved(red(), d / "a\nb.png"), RED),
    "a name of 250 characters": (lambda d: saved(red(), d / ("a" * 246 + ".png")), RED),
    "a link": (lambda d: link(d / "link.png", saved(red(), d / "elsewhere", format="PNG")), RED),
    "an array": (lambda d: array(d / "a.npy", 9, 9, 3), (7, 7, 7)),
    "bytes after the end": (lambda d: broken(d / "a.png", saved(red(), d / "a.png").read_bytes() + b"more"), RED),
    "turned by the camera": (lambda d: upside(d / "a.png"), None),
}  # fmt: skip
WRONG = {  # named, and why
    "empty": (lambda d: broken(d / "a.png", b""), "cannot identify"),
    "text": (lambda d: broken(d / "a.png", b"hello\n" * 99), "cannot identify"),
    "cut off": (lambda d: noise(d / "a.png", keep=-500), "truncated|Truncated"),
    "cut off in its head": (lambda d: noise(d / "a.png", keep=20), "."),
    "a bit changed": (lambda d: noise(d / "a.png", flip=900), "unrecognized data|broken data stream"),
    "a jpeg cut off": (lambda d: broken(d / "a.jpg", saved(red(), d / "a.jpg").read_bytes()[:-90]), "Truncated"),
    "20,000 pixels wide": (lambda d: saved(red(size=(20000, 3)), d / "a.png"), "too unequal"),
    "says 60,000 by 60,000": (lambda d: huge(d / "a.png"), "more than data.max_pixels"),
    "32 bits": (lambda d: saved(Image.new("I", (9, 9), 70000), d / "a.tif"), "range is not known"),
    "floats": (lambda d: saved(Image.new("F", (9, 9), 0.5), d / "a.tif"), "range is not known"),
    "an array of floats": (lambda d: array(d / "a.npy", 9, 9, 3, dtype=np.float32), "range is not known"),
    "an array of another shape": (lambda d: array(d / "a.npy", 3, 9, 9), "not .height, width, 3."),
    "an array cut off": (lambda d: broken(d / "a.npy", array(d / "a.npy", 9, 9, 3).read_bytes()[:-50]), "."),
    "a link to nowhere": (lambda d: link(d / "a.png", d / "nowhere"), "a broken link"),
    "a link to itself": (lambda d: link(d / "a.png", d / "a.png"), "a broken link"),
    "a pipe": (lambda d: pipe(d / "a.png"), "not a file"),
    "postscript": (lambda d: broken(d / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot ident"),
    "svg": (lambda d: broken(d / "a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot identify"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_odd_files_that_are_read(tmp_path, kind):
    make, colour = RIGHT[kind]
    path = make(tmp_path)
    data = folder(tmp_path)
    image = data.images[0]
    assert image.shape == (3, 8, 8)
    if colour is None:
        assert image[2, 1].min() == 255
        assert image[2, 6].max() == 0
    else:
        assert (to_uint8(to_x_start(image))[:, 4, 4].int() - torch.tensor(colour)).abs().max() <= 3, (
            image[:, 4, 4],
            path,
        )


@pytest.mark.parametrize("kind", WRONG)
def test_odd_files_that_are_not_read_are_named_and_can_be_skipped(tmp_path, kind):
    make, reason = WRONG[kind]
    good = picture(tmp_path / "good.png", colour=RED)
    path = make(tmp_path)
    config = Folder(path=str(tmp_path), image_size=8, channels=3)
    with pytest.raises(UsageError, match=rf"{path.name} cannot be read as an image \(.*({reason})") as caught:
        config.open()
    assert "\n" not in str(caught.value)
    data = dataclasses.replace(config, on_error="skip").open()
    assert len(data) == len(data.labels) == 1
    assert data.left_out == (str(caught.value),)
    lazy = dataclasses.replace(config, on_error="skip").list_files()
    lazy.labels = np.array([1, 1])
    lazy.fingerprint()
    images, labels, _, wrong = lazy.__getitems__([0, 1, 0])
    assert len(wrong) == (2 if path < good else 1)
    assert (images[:, 0] == RED[0]).all()
    assert labels.tolist() == [1, 1, 1]


def test_where_nothing_can_be_read_skipping_ends(tmp_path):
    for i in range(3):
        broken(tmp_path / f"{i}.png", b"no")
    config = Folder(path=str(tmp_path), image_size=8, channels=3, on_error="skip")
    with pytest.raises(UsageError, match=r"0\.png cannot be read"):
        config.open()
    lazy = config.list_files()
    with pytest.raises(UsageError, match="none of the 3 images can be read"):
        load(lazy, [1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path):
    unreadable(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"a\.png cannot be read as an image \(Permission denied"):
        folder(tmp_path)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 1, 9, 9).byte(), torch.zeros(3, 1, 8, 8).int()], ids=["size", "type"]
)
def test_a_source_that_breaks_its_word_is_refused(images, monkeypatch):
    monkeypatch.setattr(Digits, "open", lambda self, split: ArrayDataset(images, torch.zeros(3).long(), ("a",)))
    says = r"data.source digits gives images of .*; they must be torch.uint8 or torch.float32 \(1, 8, 8\)"
    with pytest.raises(UsageError, match=says):
        open_data(Digits())
