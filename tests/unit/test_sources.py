"""Every source against an independent reader: values, labels, order; and what is refused, by name."""

import csv
import dataclasses
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets as tv

from diffusion import UsageError
from diffusion.data.base import hold_out, load, open_data
from diffusion.data.sources import SOURCES
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.huggingface import HuggingFace
from diffusion.data.summary import describe_data
from diffusion.data.values import to_stored, to_x_start

REAL_DATA = os.environ.get("DIFFUSION_TEST_DATA")
RNG = np.random.default_rng(0)


def pixels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path):
    """A folder of 8x8 images in class folders, as torchvision's ImageFolder reads it."""
    root = tmp_path / "classes"
    for name, count in (("cat", 4), ("dog", 3), ("emu", 5)):
        for i in range(count):
            write(root / name / f"{i}.png", pixels(8, 8, 3))
    return root


def zipped(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, f"{prefix}{file.relative_to(root)}")
    return path


def tarred(root, path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(root / name, name)
    return path


def everything(data):
    images, labels, *_ = load(data, range(len(data)))
    return images.numpy(), labels.numpy()


def opened(path, size=8, channels=3, **fields):
    return open_data(Folder(path=str(path), image_size=size, channels=channels, **fields))


# --- folders and archives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "zip in a folder", "tar", "tar shards"])
def test_files_are_those_of_torchvision_wherever_they_lie(classes, tmp_path, kind):
    reference = tv.ImageFolder(str(classes))
    names = [str(Path(name).relative_to(classes)) for name, _ in reference.samples]
    order, path = range(len(names)), classes
    if kind.startswith("zip"):
        path = zipped(classes, tmp_path / "a.zip", "train/" * (kind != "zip"))
    elif kind == "tar":
        path = tarred(classes, tmp_path / "a.tar", names[::-1])
    elif kind == "tar shards":
        (tmp_path / "shards").mkdir()
        tarred(classes, tmp_path / "shards/0.tar", names[1::2])
        tarred(classes, tmp_path / "shards/1.tar", names[::2])
        path = tmp_path / "shards"
    images, labels = everything(opened(path))
    assert opened(path).class_names == tuple(reference.classes)
    for i, ours in zip(order, range(len(names)), strict=True):
        image, label = reference[i]
        np.testing.assert_array_equal(images[ours], np.asarray(image).transpose(2, 0, 1))
        assert labels[ours] == label


@pytest.mark.skipif(not REAL_DATA or not Path(REAL_DATA, "cifar10_train.zip").exists(), reason="no CIFAR-10 zip")
def test_the_zip_of_cifar10_is_read_without_unpacking():
    path = Path(REAL_DATA, "cifar10_train.zip")
    data = opened(path, 32)
    assert len(data) == 50_000
    assert np.bincount(data.labels).tolist() == [5000] * 10
    some = [0, 17, 49_999]
    images, labels, *_ = load(data, some)
    with zipfile.ZipFile(path) as archive:
        for i, image, label in zip(some, images, labels, strict=True):
            name = data.key_of(i)
            assert name.split("/")[1] == data.class_names[label]
            reference = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            np.testing.assert_array_equal(image.numpy(), reference.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: zipped(d, d.parent / "a.zip", "../"), "leads out of it"),
        (lambda d: (d.parent / "a.zip").write_bytes(b"PK") and d.parent / "a.zip", "cannot be read as a zip"),
        (lambda d: (d.parent / "a.tar").write_bytes(b"x" * 999) and d.parent / "a.tar", "cannot be read as a tar"),
        (lambda d: (d.parent / "a.rar").write_bytes(b"x") and d.parent / "a.rar", "not a folder, a .zip or a .tar"),
        (lambda d: zipped(d / "none", d.parent / "a.zip"), "no images"),
    ],
    ids=["paths that leave it", "cut off", "no tar", "another archive", "without images"],
)  # fmt: skip
def test_archives_that_are_refused(tmp_path, make, says):
    (tmp_path / "d/none").mkdir(parents=True)
    write(tmp_path / "d/a.png", pixels(2, 2))
    with pytest.raises(UsageError, match=says) as caught:
        opened(make(tmp_path / "d"))
    assert "\n" not in str(caught.value)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    write(tmp_path / "d/a.png", pixels(2, 2))
    content = bytearray(zipped(tmp_path / "d", tmp_path / "a.zip").read_bytes())
    entry = content.index(b"PK\1\2")  # of the archive's directory
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**30 + 1)  # the size once unpacked
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UsageError, match="longer than 1,073,741,824 bytes"):
        opened(tmp_path / "a.zip")


# --- labels -----------------------------------------------------------------------------------------------------------


def test_published_labels_are_the_prefix_of_the_name(tmp_path):
    for name in ("dog_1.png", "cat_0.png", "cat_2.png"):
        write(tmp_path / name, pixels(8, 8, 3))
    data = opened(tmp_path, labels="prefix")
    assert (data.class_names, data.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    write(tmp_path / "emu.png", pixels(8, 8, 3))
    with pytest.raises(UsageError, match=r"emu\.png .*has no _ after a class"):
        opened(tmp_path, labels="prefix")


def buckets(root, entries):
    for name, _ in entries:
        write(root / name, pixels(8, 8, 3))
    (root / "dataset.json").write_text(json.dumps({"labels": entries}))


def test_labels_of_nvidias_tools_are_read_in_folders_and_zips(tmp_path):
    root = tmp_path / "d"
    buckets(root, [["00000/img00000000.png", 7], ["00000/img00000001.png", 2], ["00001/img00000002.png", 7]])
    for path in (root, zipped(root, tmp_path / "a.zip")):
        data = opened(path)
        assert (data.class_names, data.labels.tolist()) == (("2", "7"), [1, 0, 1])
    assert opened(root, labels="folders").class_names == ("00000", "00001")
    assert opened(root, labels="none").class_names == ()


def test_labels_of_a_csv_are_read(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", pixels(8, 8, 3))
    rows = [["file_name", "note", "label"], ["2.png", "", "b"], ["0.png", "x,y", "b"], ["1.png", "", "a"]]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = opened(tmp_path, labels="mine.csv")
    assert (data.class_names, data.labels.tolist()) == (("a", "b"), [1, 0, 1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"labels": [["0.png", 1]]}, "has no label for 1.png"),
        ({"labels": [["0.png", 1], ["1.png", 0], ["2.png", 0]]}, "has a label for 2.png, which is not an image"),
        ({"labels": [["0.png", 1], ["1.png", 0], ["0.png", 0]]}, "is listed twice"),
        ({"labels": [["0.png", 1], ["1.png", "x"]]}, "not all whole numbers"),
        ({"labels": [["0.png", 1.5], ["1.png", 2]]}, "not all whole numbers"),
        ([1], "is not a list of files and labels"),
        ("{", "is not a list of files and labels"),
    ],
    ids=["missing", "too many", "twice", "mixed", "fraction", "a list", "cut off"],
)
def test_labels_that_do_not_match_are_named(tmp_path, content, says):
    for i in range(2):
        write(tmp_path / f"{i}.png", pixels(8, 8, 3))
    (tmp_path / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=says) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_way_to_label_is_named(classes):
    with pytest.raises(UsageError, match=r"data.labels is prefixes; it must be one of .*did you mean prefix"):
        opened(classes, labels="prefixes")


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    write(tmp_path / "train/cat/0.png", pixels(8, 8, 3))
    assert opened(tmp_path).class_names == ("cat",)
    write(tmp_path / "val/cat/0.png", pixels(8, 8, 3))
    with pytest.raises(UsageError, match=r"holds the parts train, val of a data set: name one, --data.path .*/train"):
        opened(tmp_path)
    assert len(opened(tmp_path, labels="none")) == 2


def test_the_only_part_of_a_data_set_is_no_class(tmp_path):
    write(tmp_path / "test/0.png", pixels(8, 8, 3))
    data = opened(tmp_path)
    assert (data.class_names, data.files.no_classes) == ((), "test/0.png lies in no class folder")


def test_a_stray_file_is_named(classes):
    write(classes / "preview.png", pixels(8, 8, 3))
    data = opened(classes)
    assert (data.class_names, data.files.no_classes) == (
        (), "preview.png lies in no class folder, beside the folder cat")  # fmt: skip


def test_what_systems_leave_behind_is_no_data(classes, tmp_path):
    expected = opened(classes).fingerprint()
    for name in ("__MACOSX/cat/._0.png", ".ipynb_checkpoints/0.png", "cat/.0.png", "@eaDir/0.png", "dog/Thumbs.db"):
        (classes / name).parent.mkdir(exist_ok=True, parents=True)
        (classes / name).write_bytes(b"no image")
    assert opened(classes).fingerprint() == expected
    assert len(opened(zipped(classes, tmp_path / "a.zip"))) == 12


# --- values -----------------------------------------------------------------------------------------------------------


def exactly(array, low, high):
    """Values to [-1, 1], by another way than the code's."""
    return np.interp(array.astype(np.float64), [low, high], [-1.0, 1.0])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_sixteen_bits_are_used_whole(tmp_path, suffix):
    array = pixels(8, 8, dtype=np.uint16)
    write(tmp_path / f"a{suffix}", array)
    images, _ = everything(opened(tmp_path, channels=1))
    np.testing.assert_allclose(images[0, 0], exactly(array, 0, 65535), atol=2e-7)
    images, _ = everything(opened(tmp_path, channels=1, range=(0, 65535)))
    np.testing.assert_array_equal(to_stored(torch.from_numpy(images), (0, 65535))[0, 0], array)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16, np.int64, np.uint8])
def test_a_declared_range_is_what_becomes_minus_one_to_one(tmp_path, dtype):
    array = (RNG.random((8, 8, 2)) * 100).astype(dtype)
    write(tmp_path / "a.npy", array)
    images, _ = everything(opened(tmp_path, channels=2, range=(0, 100)))
    np.testing.assert_allclose(images[0], exactly(array, 0, 100).transpose(2, 0, 1), atol=2e-7)


@pytest.mark.parametrize(
    ("array", "fields", "says"),
    [
        (np.float32([[0.5]]), {}, "values are float32 from 0.5 to 0.5, whose range is not known: declare it"),
        (np.float32([[1.5]]), {"range": (0.0, 1.0)}, r"from 1.5 to 1.5, are not within data.range \[0, 1\]"),
        (np.float32([[np.nan]]), {"range": (0.0, 1.0)}, "from nan to nan, are not within"),
        (np.float32([[-np.inf]]), {"range": (0.0, 1.0)}, "from -inf to -inf, are not within"),
        (np.array([["a"]]), {"range": (0.0, 1.0)}, "nan"),
        (np.complex64([[1j]]), {"range": (0.0, 1.0)}, "nan"),
        (np.zeros((0, 4), np.uint8), {}, r"\(0, 4\)"),
    ],
    ids=["no range", "above", "nan", "inf", "text", "complex", "empty"],
)
def test_values_out_of_range_are_named(tmp_path, array, fields, says):
    write(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=says) as caught:
        opened(tmp_path, 1, 1, **fields)
    assert "\n" not in str(caught.value)


def test_a_range_goes_up():
    with pytest.raises(UsageError, match=r"data.range is \[1, 1\]; it must rise"):
        Folder(range=(1, 1))


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [(None, np.uint8), ((0, 255), np.uint8), ((0, 4095), np.uint16), ((0.0, 4095.0), np.float32), ((-1, 1), np.float32),
     ((0.0, 255.0), np.float32)],
)  # fmt: skip
def test_values_go_back_to_what_they_were(declared, dtype):
    low, high = declared or (0, 255)
    x = torch.linspace(-1, 1, 11)[None]
    stored = to_stored(x, declared)
    assert stored.dtype == dtype
    np.testing.assert_allclose(stored[0], np.interp(np.linspace(-1, 1, 11), [-1, 1], [low, high]),
                               atol=0.5 if dtype != np.float32 else 1e-4 * (high - low))  # fmt: skip


@pytest.mark.parametrize("planar", ["separate", "contig"])
def test_tiffs_that_pil_does_not_read_whole_are_read(tmp_path, planar):
    import tifffile

    bands = pixels(8, 8, 4)
    tifffile.imwrite(tmp_path / "bands.tif", np.moveaxis(bands, -1, 0) if planar == "separate" else bands,
                     photometric="rgb", extrasamples=["unspecified"], planarconfig=planar)  # fmt: skip
    np.testing.assert_array_equal(everything(opened(tmp_path, channels=4))[0][0], bands.transpose(2, 0, 1))
    deep = pixels(8, 8, 3, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "bands.tif", deep, photometric="rgb")
    images, _ = everything(opened(tmp_path, channels=3, range=(0, 65535)))
    np.testing.assert_array_equal(to_stored(torch.from_numpy(images), (0, 65535))[0], deep.transpose(2, 0, 1))
    values = RNG.random((8, 8)).astype(np.float32)
    tifffile.imwrite(tmp_path / "bands.tif", values)
    images, _ = everything(opened(tmp_path, channels=1, range=(0.0, 1.0)))
    np.testing.assert_allclose(images[0, 0], exactly(values, 0, 1), atol=2e-7)


def test_pages_of_a_tiff_are_a_volume_or_refused(tmp_path):
    import tifffile

    pages = pixels(4, 8, 8)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    with pytest.raises(UsageError, match=r"\(4, 8, 8, 1\) uint8, not \(height, width, 1\)"):
        opened(tmp_path, channels=1)
    np.testing.assert_array_equal(everything(opened(tmp_path, (4, 8, 8), 1))[0][0, 0], pages)


def test_without_tifffile_the_package_is_named(tmp_path, monkeypatch):
    Image.fromarray(pixels(8, 8)).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(pixels(8, 8))])
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UsageError, match="a TIFF that PIL does not read whole: pip install tifffile"):
        opened(tmp_path)


def test_hidden_colour_is_not_learnt(tmp_path):
    array = np.zeros((8, 8, 4), np.uint8)
    array[..., 0] = 200  # red, under alpha 0
    array[:, 4:, 3] = 255
    write(tmp_path / "a.png", array)
    for background in (255, 0, 90):
        image = everything(opened(tmp_path, background=background))[0][0]
        assert image[:, 0, 0].tolist() == [background] * 3
        assert image[:, 0, 7].tolist() == [200, 0, 0]
    assert everything(opened(tmp_path, channels=4))[0][0][:, 0, 0].tolist() == [200, 0, 0, 0]


def transparent(path, mode, colour, bits):
    """A PNG whose colour `colour` is transparent, with `bits` bits a channel, written by hand."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 8, 8, bits, mode, 0, 0, 0)
    body = zlib.compress((b"\0" + b"\xff" * bits) * 8)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(">H", colour))
                     + chunk(b"IDAT", body) + chunk(b"IEND", b""))  # fmt: skip
    return path


@pytest.mark.parametrize(("bits", "colour"), [(1, 1), (2, 3), (4, 15)])
def test_a_transparent_grey_of_few_bits_shows_the_background(tmp_path, bits, colour):
    transparent(tmp_path / "a.png", 0, colour, bits)
    assert (everything(opened(tmp_path, background=70))[0] == 70).all()


def test_a_transparent_grey_of_sixteen_bits_is_refused(tmp_path):
    transparent(tmp_path / "a.png", 0, 65535, 16)
    with pytest.raises(UsageError, match="16 bits and a transparent colour, which are not read together"):
        opened(tmp_path, channels=1)


DEEP = pixels(8, 8, 4, dtype=np.uint16)
TIFFS = {
    "white is zero": (dict(data=DEEP[..., 0], photometric="miniswhite"), 1, "photometric 0"),
    "turned": (dict(data=DEEP[..., :3], photometric="rgb", extratags=[(274, "H", 1, 3, True)]), 3, "orientation 3"),
    "signed": (dict(data=pixels(8, 8).view(np.int8), photometric="minisblack"), 1, "int8 .* whose range is not known"),
    "cmyk": (dict(data=DEEP, photometric="separated"), 4, "photometric 5"),
    "premultiplied": (dict(data=DEEP, photometric="rgb", extrasamples=["assocalpha"]), 4, "extra samples .1."),
    "pages for channels": (dict(data=pixels(8, 8, 3), photometric="minisblack"), 3, "not .height, width, 3."),
    "32 bits": (dict(data=DEEP[..., 0].astype(np.uint32), photometric="minisblack"), 1, "uint32 .* is not known"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_whose_values_mean_something_else_are_refused(tmp_path, kind):
    import tifffile

    options, channels, says = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", **options)
    with pytest.raises(UsageError, match=says):
        opened(tmp_path, channels=channels)


def test_the_largest_image_of_a_tiff_is_read(tmp_path):
    import tifffile

    large = pixels(8, 8, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(pixels(4, 4, 3), photometric="rgb")
        tiff.write(large, photometric="rgb")
    np.testing.assert_array_equal(everything(opened(tmp_path))[0][0], large.transpose(2, 0, 1))


def test_the_order_of_bytes_does_not_matter(tmp_path):
    import tifffile

    array = pixels(8, 8, dtype=np.uint16)
    np.save(tmp_path / "a.npy", array.astype(">u2"))
    np.save(tmp_path / "b.npy", np.asfortranarray(array))
    tifffile.imwrite(tmp_path / "c.tif", array, byteorder=">", photometric="minisblack")
    for image in everything(opened(tmp_path, channels=1))[0]:
        np.testing.assert_allclose(image[0], exactly(array, 0, 65535), atol=2e-7)


@pytest.mark.parametrize("declared", [(float("-inf"), 1.0), (0.0, float("nan"))])
def test_ranges_that_floats_do_not_hold_are_refused(declared):
    with pytest.raises(UsageError, match=r"data\.range is"):
        Folder(range=declared)


# --- what archives, links and label files may hold ---


def tar_of(path, members, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), kind
            archive.addfile(info, io.BytesIO(content))
    return path


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def test_names_that_begin_with_a_dot_and_slash_are_plain(tmp_path):
    path = tar_of(tmp_path / "a.tar", [("./a/1.png", png(1)), ("a/2.png", png(2)), ("a/1.png", png(9))])
    images, _ = everything(opened(path))
    assert images[:, 0, 0, 0].tolist() == [9, 2]  # as tar unpacks: the last of a name
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("./b/1.png", png(5))
    assert opened(tmp_path / "a.zip").class_names == ("b",)
    with pytest.raises(UsageError, match="leads out of it"):
        opened(tar_of(tmp_path / "b.tar", [("/a/1.png", png(1))]))


def test_images_beside_an_archive_are_read_and_the_archive_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(png(3))
    tar_of(tmp_path / "backup.tar", [("old.png", png(1))])
    data = opened(tmp_path)
    assert everything(data)[0][:, 0, 0, 0].tolist() == [3]
    assert data.files.not_read == {".tar": 1}


def test_shards_may_repeat_names_and_have_their_labels_beside(tmp_path):
    """As WebDataset's: the key is the shard and the name, and 000.cls is the class of 000.png."""
    for shard in range(2):
        tar_of(tmp_path / f"{shard}.tar", [("000.png", png(10 * shard)), ("000.cls", b"7\n"),
                                           ("001.png", png(10 * shard + 1)), ("001.cls", b"10")])  # fmt: skip
    data = opened(tmp_path)
    images, labels = everything(data)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert (labels.tolist(), data.class_names) == ([0, 1, 0, 1], ("7", "10"))
    assert data.key_of(2) == "1.tar/000.png"
    assert not data.files.not_read
    tar_of(tmp_path / "1.tar", [("000.png", png(1))])
    with pytest.raises(UsageError, match=r"data.labels cls has no label for 1.tar/000.png"):
        opened(tmp_path)


def test_classes_of_shards_that_repeat_names_are_their_folders(tmp_path):
    for shard in range(2):
        tar_of(tmp_path / f"{shard}.tar", [("cat/0.png", png(shard)), ("dog/0.png", png(shard))])
    data = opened(tmp_path)
    assert (everything(data)[1].tolist(), data.class_names) == ([0, 1, 0, 1], ("cat", "dog"))


def test_a_pattern_chooses_images_and_pairs_are_named(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:03}.input.png", pixels(8, 8, 3))
        write(tmp_path / f"{i:03}.mask.png", pixels(8, 8, 3))
    config = Folder(path=str(tmp_path), image_size=8)
    [line] = [line for line in describe_data(config, open_data(config)) if "--data.include" in line]
    assert line.startswith("40 belong together, like 000.input.png and 000.mask.png: --data.include chooses some")
    config = Folder(path=str(tmp_path), image_size=8, include="*.input.png")
    data = open_data(config)
    assert len(data) == 20
    lines = describe_data(config, data)
    assert "not read: 20 images that data.include leaves out" in lines
    assert not any("belong together" in line for line in lines)
    with pytest.raises(UsageError, match=r"data.include is \*\.jpg; none of the 40 images .* match it, such as 000"):
        open_data(Folder(path=str(tmp_path), image_size=8, include="*.jpg"))


def test_a_pipe_with_an_archives_name_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UsageError, match=r"it is not a file|no images"):
        opened(tmp_path)


def test_a_linked_folder_is_read_under_its_own_name(tmp_path):
    write(tmp_path / "real/1.png", pixels(8, 8, 3))
    write(tmp_path / "zoo/1.png", pixels(8, 8, 3))
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert opened(tmp_path).class_names == ("real", "zoo")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("a.png,cat\nb.png,\n", "the label of b.png is empty"),
        ("a.png,-1\nb.png,1\n", "not all whole numbers|empty or negative"),
        ("a.png\nb.png,x\n", "empty"),
    ],
)
def test_csv_labels_that_are_no_labels_are_named(tmp_path, rows, says):
    for name in "ab":
        write(tmp_path / f"{name}.png", pixels(8, 8, 3))
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{rows}")
    with pytest.raises(UsageError, match=says):
        opened(tmp_path)
    (tmp_path / "labels.csv").write_text("file;label\na.png;1\n")
    with pytest.raises(UsageError, match="it has the columns file;label, and needs file_name and label"):
        opened(tmp_path)


def test_numbers_with_zeros_in_front_are_names(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", pixels(8, 8, 3))
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,002\nb.png,001\n")
    assert opened(tmp_path).class_names == ("001", "002")


def test_a_data_set_of_nvidias_tools_without_labels_has_no_classes(tmp_path):
    write(tmp_path / "00000/a.png", pixels(8, 8, 3))
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    data = opened(tmp_path)
    assert (data.class_names, data.files.no_classes) == ((), "dataset.json has none")


def test_a_label_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "a.png", pixels(8, 8, 3))
    (tmp_path / "labels.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"data.labels labels.csv cannot be read: it is a broken link"):
        opened(tmp_path)


def test_large_label_numbers_are_classes_by_their_order(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(4, 8, 8), labels=np.array([7, 3_000_000, 7, 2**63 + 5], np.uint64))
    data = open_data(Arrays(path=str(tmp_path / "a.npz"), image_size=8, channels=1))
    assert (data.class_names, data.labels.tolist()) == (("7", "3000000", str(2**63 + 5)), [0, 1, 0, 2])


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_rectangles_are_covered_and_cropped_to_the_centre(tmp_path):
    array = np.zeros((8, 32, 3), np.uint8)
    array[:, 8:24] = 255
    write(tmp_path / "a.png", array)
    image = everything(opened(tmp_path, (8, 16)))[0]
    assert image.shape == (1, 3, 8, 16)
    assert (image == 255).all()
    assert (everything(opened(tmp_path, (4, 16)))[0][0, 0, :, :4] == 0).all()


def test_a_size_of_null_is_that_of_the_first_image(tmp_path):
    write(tmp_path / "a.npy", pixels(5, 6, 7, 2))
    config = Folder(path=str(tmp_path), image_size=None, channels=2)
    assert config.found_sizes() == (5, 6, 7)
    write(tmp_path / "a.npy", pixels(9))
    assert dataclasses.replace(config, channels=1).found_sizes() == (9,)
    write(tmp_path / "a.npy", pixels(9, 3))
    with pytest.raises(UsageError, match=r"image_size is null, and .*a.npy cannot be read .*data.channels is 2"):
        config.found_sizes()
    (tmp_path / "a.npy").unlink()
    write(tmp_path / "a.png", pixels(9, 11, 3))
    assert dataclasses.replace(config, channels=3).found_sizes() == (9, 11)


def test_signals_and_volumes_of_another_size_are_refused(tmp_path):
    write(tmp_path / "a.npy", pixels(9))
    with pytest.raises(UsageError, match=r"its sides are \[9\], and data.image_size is \[8\]"):
        opened(tmp_path, (8,), 1)


def test_the_limit_of_pixels_is_the_settings_and_not_pils(tmp_path, monkeypatch):
    write(tmp_path / "a.png", pixels(32, 32, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UsageError, match=r"it has 32 x 32 pixels, more than data\.max_pixels 1000"):
        opened(tmp_path, max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(opened(tmp_path)) == 1


# --- other sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npy", "npz", "channels first", "no channels"])
def test_arrays_are_read_as_they_are(tmp_path, layout):
    images, labels = pixels(6, 8, 8, 3), np.array([2, 0, 1, 1, 0, 2])
    path = tmp_path / ("a.npz" if layout == "npz" else "a.npy")
    if layout == "npz":
        np.savez(path, images=images, labels=labels)
    elif layout == "no channels":
        images = images[..., :1]
        np.save(path, images[..., 0])
    else:
        np.save(path, np.moveaxis(images, -1, 1) if layout == "channels first" else images)
    config = Arrays(path=str(path), channels=images.shape[-1])
    config = dataclasses.replace(config, image_size=config.found_sizes())
    data = open_data(config)
    found, found_labels = everything(data)
    np.testing.assert_array_equal(found, np.moveaxis(images, -1, 1))
    assert data.class_names == (("0", "1", "2") if layout == "npz" else ())
    assert found_labels.tolist() == (labels.tolist() if layout == "npz" else [0] * 6)


def test_large_arrays_stay_on_disk_and_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    array = pixels(6, 16, 2, dtype=np.int16)
    np.save(tmp_path / "a.npy", array)
    config = Arrays(path=str(tmp_path / "a.npy"), image_size=(16,), channels=2, range=(-32768, 32767))
    data = open_data(config)
    np.testing.assert_allclose(everything(data)[0], exactly(array, -32768, 32767).transpose(0, 2, 1), atol=2e-7)
    before = data.fingerprint()
    array[3, 1, 1] ^= 1
    np.save(tmp_path / "a.npy", array)
    assert open_data(config).fingerprint() != before


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"labels .* are \(3,\) int64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "whole numbers from 0"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "whole numbers from 0"),
        ({"other": np.zeros((2, 4, 4), np.uint8)}, r"holds other, and no images"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "and no images"),
        ({"images": np.array([[print]], dtype=object)}, "cannot be read as arrays"),
        ({"images": np.zeros((2, 4, 4), np.float32)}, "whose range is not known"),
        (None, "cannot be read as arrays"),
    ],
    ids=["count", "negative", "fractions", "names", "none", "pickled", "range", "text"],
)
def test_arrays_that_are_refused(tmp_path, arrays, says):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays) if arrays else path.write_text("hello")
    with pytest.raises(UsageError, match=says) as caught:
        open_data(Arrays(path=str(path), image_size=4, channels=1))
    assert "\n" not in str(caught.value)


@pytest.fixture
def table(tmp_path):
    """A data set that `datasets` has saved, and its images and labels."""
    datasets = pytest.importorskip("datasets")
    images, labels = [pixels(8, 8, 3) for _ in range(5)], [1, 0, 1, 1, 0]
    features = datasets.Features(
        {"id": datasets.Value("int64"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"id": list(range(5)), "photo": [Image.fromarray(image) for image in images], "kind": labels}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "table")
    return tmp_path / "table", images, labels


def test_a_table_of_hugging_face_is_read_by_row(table):
    path, images, labels = table
    config = HuggingFace(path=str(path), image_size=8)
    data = open_data(config)
    found, found_labels = everything(data)
    np.testing.assert_array_equal(found, np.stack(images).transpose(0, 3, 1, 2))
    assert (found_labels.tolist(), data.class_names) == (labels, ("a", "b"))
    assert open_data(dataclasses.replace(config, label_column="none")).class_names == ()
    assert config.list_files().fingerprint() == config.list_files().fingerprint()


@pytest.mark.parametrize(
    ("fields", "split", "says"),
    [
        ({"image_column": "image"}, "train", "data.image_column is image; it must be one of photo"),
        ({"label_column": "id"}, "train", "data.label_column is id; it must be one of kind, none"),
        ({}, "test", "it must be one of train"),
        ({"path": "nobody/no-such-data-set"}, "train", "cannot be loaded as a data set"),
        ({"path": None}, "train", "name the data set with --data.path"),
    ],
)
def test_tables_that_are_refused(table, monkeypatch, fields, split, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=says) as caught:
        open_data(HuggingFace(**{"path": str(table[0]), "image_size": 8} | fields), split)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"data\.source huggingface needs a package: pip install datasets"):
        open_data(HuggingFace(path="x"))


class Fake:
    """What torchvision's data sets have in common."""

    def __init__(self, **fields):
        self.__dict__ |= fields


@pytest.mark.parametrize("source", ["fashion_mnist", "cifar100", "svhn"])
def test_torchvisions_arrays_are_read(source, monkeypatch):
    kind = SOURCES[source]
    labels = np.array([3, 0, 9])
    images = pixels(3, 28, 28) if source == "fashion_mnist" else pixels(3, 32, 32, 3)
    if source == "svhn":
        fake, asked = Fake(data=images.transpose(0, 3, 1, 2), labels=labels), {"split": "test"}
    else:
        classes = [f"class {i}" for i in range(100)]
        fake, asked = Fake(data=images, targets=labels.tolist(), classes=classes), {"train": False}
    seen = {}
    monkeypatch.setattr(tv, kind.__name__, lambda root, **part: seen.update(part) or fake)
    found, found_labels = everything(open_data(kind(path="x"), "test"))
    np.testing.assert_array_equal(found, images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
    assert found_labels.tolist() == labels.tolist()
    assert seen == asked | {"download": False}


def test_celeba_is_its_part_of_a_folder(tmp_path, monkeypatch):
    names = [f"{i:06d}.png" for i in range(5)]
    arrays = {name: pixels(8, 8, 3) for name in names}
    for name, array in arrays.items():
        write(tmp_path / "celeba/img_align_celeba" / name, array)
    monkeypatch.setattr(tv, "CelebA", lambda root, **part: Fake(filename=names[1:4]))
    config = SOURCES["celeba"](path=str(tmp_path), image_size=8)
    np.testing.assert_array_equal(everything(open_data(config))[0],
                                  np.stack([arrays[name] for name in names[1:4]]).transpose(0, 3, 1, 2))  # fmt: skip
    (tmp_path / "celeba/img_align_celeba" / names[2]).unlink()
    with pytest.raises(UsageError, match="holds 2 of the 3 images of celeba"):
        open_data(config)


# --- held out ---------------------------------------------------------------------------------------------------------


def test_what_is_held_out_depends_on_names_and_seed_alone(classes, tmp_path):
    def split(path, seed=0):
        train, out = hold_out(opened(path), 0.3, seed)
        names = [{part.key_of(i) for i in range(len(part))} for part in (train, out)]
        assert not names[0] & names[1]
        return names

    train, out = split(classes)
    assert len(train) + len(out) == 12
    assert split(classes, seed=1)[1] != out
    moved = classes.rename(tmp_path / "elsewhere")
    assert split(moved) == [train, out]
    write(moved / "cat/new.png", pixels(8, 8, 3))
    assert split(moved)[1] - {"cat/new.png"} == out


def test_holding_out_nothing_or_everything_is_named(classes):
    with pytest.raises(UsageError, match=r"data\.held_out is 1e-09, which of 12 images holds out 0"):
        hold_out(opened(classes), 1e-9, 0)


def test_a_file_that_changed_in_place_is_named(classes):
    files = Folder(path=str(classes), image_size=8).list_files()
    write(classes / "cat/0.png", pixels(16, 16, 3))
    with pytest.raises(UsageError, match=r"cat/0\.png cannot be read as an image \(it has changed since"):
        files.in_memory()


# --- everything at once -----------------------------------------------------------------------------------------------

KINDS = ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "npy8", "npy16", "npyfloat"]


@st.composite
def folders(draw):
    """Files of a small folder: (name, kind, seed), and a layout of classes."""
    layout = draw(st.sampled_from(["flat", "classes", "train", "prefix", "json"]))
    files = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), min_size=1, max_size=6))
    return layout, files, draw(st.sampled_from([1, 3])), draw(st.integers(0, 255))


def make(path, kind, seed):
    """Write a file of 6x6 pixels; what a network should see of it in RGBA, in [0, 1]."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 256, (6, 6, 4)).astype(np.uint8)
    rgba = np.concatenate([level[..., :3], np.full((6, 6, 1), 255, np.uint8)], axis=2) / 255.0
    if kind in ("npy8", "npy16", "npyfloat"):
        return None
    if kind == "I;16":
        deep = rng.integers(0, 65536, (6, 6)).astype(np.uint16)
        Image.fromarray(deep).save(path)
        return np.dstack([deep / 65535.0] * 3 + [np.ones((6, 6))])
    if kind == "1":
        bits = level[..., 0] > 127
        Image.fromarray(bits).save(path)
        return np.dstack([bits * 1.0] * 3 + [np.ones((6, 6))])
    if kind == "P":
        image = Image.new("P", (6, 6))
        palette = rng.integers(0, 256, (4, 3)).astype(np.uint8)
        index = level[..., 0] % 4
        image.putdata(index.flatten().tolist())
        image.putpalette(palette.flatten().tolist())
        image.save(path)
        return np.dstack([palette[index] / 255.0, np.ones((6, 6))])
    if kind in ("L", "LA"):
        grey = level[..., 0]
        alpha = level[..., 3] if kind == "LA" else np.full((6, 6), 255, np.uint8)
        Image.fromarray(np.dstack([grey, alpha]) if kind == "LA" else grey).save(path)
        return np.dstack([grey / 255.0] * 3 + [alpha / 255.0])
    if kind == "RGBA":
        Image.fromarray(level).save(path)
        return level / 255.0
    Image.fromarray(level[..., :3]).save(path)
    return rgba


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(folders())
def test_the_network_sees_what_a_reader_of_our_own_sees(tmp_path_factory, drawn):
    layout, files, channels, background = drawn
    root, expected = tmp_path_factory.mktemp("drawn"), {}
    for i, (kind, seed) in enumerate(files):
        label = ("x", "y")[seed % 2]
        name = {"flat": f"{i}.png", "classes": f"{label}/{i}.png", "train": f"train/{label}/{i}.png",
                "prefix": f"{label}_{i}.png", "json": f"0000/{i}.png"}[layout]  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        seen = make(root / name, kind, seed)
        if seen is not None:
            expected[name] = seen, label
    if layout == "json":
        (root / "dataset.json").write_text(
            json.dumps({"labels": [[name, label] for name, (_, label) in expected.items()]})
        )
    if not expected:
        with pytest.raises(UsageError, match="no images"):
            opened(root, 6, channels)
        return
    data = opened(root, 6, channels, background=background, labels="prefix" if layout == "prefix" else None)
    images, labels = everything(data)
    assert [data.key_of(i) for i in range(len(data))] == sorted(expected)
    for image, label, name in zip(images, labels, sorted(expected), strict=True):
        rgba, word = expected[name]
        rgb = rgba[..., :3] * rgba[..., 3:] + background / 255 * (1 - rgba[..., 3:])
        grey = rgb @ [0.299, 0.587, 0.114]
        wanted = (grey[None] if channels == 1 else rgb.transpose(2, 0, 1)) * 2 - 1
        found = to_x_start(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(found, wanted, atol=2.5 / 127.5)  # PIL rounds in 8 bits: alpha, then grey
        assert (data.class_names[label] if data.class_names else None) == (None if layout == "flat" else word)


# --- said, wherever it is asked ---------------------------------------------------------------------------------------


def test_what_is_done_with_images_is_said(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.jpg", pixels(8, 8, 3))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "turned.jpg", exif=exif)
    config = Folder(path=str(tmp_path), image_size=8, channels=1, random_flip=True)
    lines = "\n".join(describe_data(config, open_data(config)))
    assert "5 in colour, which becomes grey" in lines
    assert "1 are turned upright" in lines
    assert "half of the images are mirrored left to right" in lines
    config = dataclasses.replace(config, channels=3, random_flip=False)
    lines = "\n".join(describe_data(config, open_data(config)))
    assert "grey" not in lines
    assert "mirrored" not in lines


def test_files_that_are_left_out_are_counted(tmp_path):
    for i in range(8):
        write(tmp_path / f"{i}.png", pixels(8, 8, 3))
    (tmp_path / "7.png").write_bytes(b"no")
    config = Folder(path=str(tmp_path), image_size=8, on_error="skip")
    [line] = [line for line in describe_data(config, open_data(config)) if "left out" in line]
    assert line.startswith("1 more are left out, since they cannot be read: ")
    assert "7.png" in line


@pytest.mark.parametrize(
    ("values", "proposed"),
    [((0.0, 0.9), "[0.0, 1.0]"), ((-0.5, 1.0), "[-1.0, 1.0]"), ((0, 200.0), "[0, 255]"), ((3, 4000), "[0, 4095]"),
     ((-3.5, 7.25), "[-3.5, 7.25]")],
)  # fmt: skip
def test_the_range_that_is_proposed_holds_the_values(tmp_path, values, proposed):
    array = np.array(values, np.float64).reshape(2, 1, 1).repeat(64, 2).reshape(2, 8, 8)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError) as caught:
        open_data(Arrays(path=str(tmp_path / "a.npy"), image_size=8, channels=1))
    assert str(caught.value).endswith(f'--data.range "{proposed}"')
    with pytest.raises(UsageError, match=r"is not a folder, a .zip or a .tar: add --data.source arrays"):
        open_data(Folder(path=str(tmp_path / "a.npy"), image_size=8))


def test_the_sizes_of_an_array_are_read_from_its_header(tmp_path):
    """Of a file of gigabytes, that is all there is to read; here the rest is not even there."""
    with (tmp_path / "0.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (40_000, 50_000, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    assert Folder(path=str(tmp_path), image_size=None).found_sizes() == (40_000, 50_000)
