"""Condition vectors and images: how they are read and paired, and what a network does with them."""

import csv
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import moved
from PIL import Image

from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.data.base import hold_out, load, open_data
from diffusion.data.conditions import Scale, Vectors
from diffusion.data.image_files import FileDataset
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import describe_data
from diffusion.losses import training_losses
from diffusion.models.conditions import drop
from diffusion.models.networks import NETWORKS
from diffusion.training.build import build_step

NAMES = ["b/3.png", "a/1.png", "a/2.png"]
EACH = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three images whose grey level is their number, masks of ten times the level, and a table of fifty times it."""
    for name in NAMES:
        level = int(name[2])
        for root, suffix, factor in (("images", ".png", 1), ("masks", "_mask.png", 10), ("both", ".in.png", 1),
                                     ("both", ".mask.png", 10)):  # fmt: skip
            path = tmp_path / root / name.replace(".png", suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), factor * level).save(path)
    table(tmp_path / "table.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path, rows=None):
    rows = rows or [{"file_name": name, "size": 50 * int(name[2]), "turn": -int(name[2])} for name in NAMES]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def images(**settings):
    return Folder(**{"path": "images", "image_size": 8, "channels": 1, "labels": "none"} | settings)


def levels(dataset):
    batch = load(dataset, range(len(dataset)))
    pictures = batch.condition_images
    return batch.images.amax((1, 2, 3)).tolist(), pictures.amax((1, 2, 3)).tolist() if pictures.shape[1] else None


MASKS = {"condition_channels": 1, "condition_images": "masks"}


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "lazy"])
def test_a_table_and_masks_belong_to_images_by_name(folder, lazy, monkeypatch):
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0 if lazy else 2**20)
    dataset = open_data(images(conditions="table.csv", **MASKS))
    assert isinstance(dataset, FileDataset) == lazy
    assert levels(dataset) == ([1, 2, 3], [10, 20, 30])
    assert load(dataset, [2, 0]).vectors.tolist() == [[150, -3], [50, -1]]
    part = dataset.select(np.array([2]))
    assert (levels(part), load(part, [0]).vectors.tolist()) == (([3], [30]), [[150, -3]])
    trained, out = hold_out(dataset, 0.5, 0)
    for half in (trained, out):
        assert all(vector[0] == 50 * level for vector, level in zip(load(half, range(len(half))).vectors.tolist(),
                                                                   levels(half)[0], strict=True))  # fmt: skip
    lines = describe_data(images(conditions="table.csv", **MASKS), dataset)
    assert "conditions of table.csv: size from 50 to 150, turn from -3 to -1" in lines
    assert any(line.startswith("condition images of 1 channels, from masks") for line in lines)


def test_a_hash_tells_conditions_apart(folder):
    config = images(conditions="table.csv", condition_columns=["size"], **MASKS)
    before = open_data(config).fingerprint()
    assert before == open_data(config).fingerprint() != open_data(images()).fingerprint()
    table(folder / "table.csv", [{"file_name": name, "size": 1 + int(name[2])} for name in NAMES])
    changed = open_data(config).fingerprint()
    assert changed != before
    Image.new("L", (8, 8), 77).save("masks/a/1_mask.png")
    assert open_data(config).fingerprint() not in (before, changed)


def test_a_pattern_takes_condition_images_from_the_same_folder(folder):
    dataset = open_data(images(path="both", include="*.in.png", condition_channels=1, condition_images="*.mask.png"))
    assert levels(dataset) == ([1, 2, 3], [10, 20, 30])
    some = open_data(
        images(include="a/*", **MASKS, conditions="table.csv")
    )  # rows and masks of the others are no error
    assert levels(some) == ([1, 2], [10, 20])


def test_the_same_images_in_grey_are_the_condition_of_colour(folder):
    for i in (1, 2):
        Image.new("RGB", (8, 8), (200, 0, 10 * i)).save(f"images/{i}.png")
    dataset = open_data(images(include="[12].png", channels=3, condition_images="images", condition_channels=1))
    batch = load(dataset, [0, 1])
    assert batch.images[1, :, 0, 0].tolist() == [200, 0, 20]
    assert batch.condition_images[:, 0, 0, 0].tolist() == [61, 62]  # 0.299 R + 0.114 B


def test_arrays_hold_conditions_as_channels_in_another_file_and_as_columns(tmp_path):
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    vectors = np.random.default_rng(0).normal(size=(5, 7))
    np.savez(tmp_path / "a.npz", images=pixels, labels=[0, 1, 0, 1, 1], angle=np.arange(5.0), text=vectors)
    np.save(tmp_path / "mask.npy", pixels[..., :1] / 255)
    np.save(tmp_path / "vectors.npy", vectors)
    path = str(tmp_path / "a.npz")
    inside = open_data(Arrays(path=path, image_size=4, channels=1, condition_channels=2, conditions=path))
    apart = open_data(Arrays(path=path, image_size=4, channels=3, condition_channels=1, condition_range=[0.0, 1.0],
                             condition_images=str(tmp_path / "mask.npy"),
                             conditions=str(tmp_path / "vectors.npy")))  # fmt: skip
    batch = load(inside, [3])
    assert batch.images.flatten().tolist() == pixels[3, ..., 0].flatten().tolist()
    assert batch.condition_images[0].movedim(0, -1).flatten().tolist() == pixels[3, ..., 1:].flatten().tolist()
    assert inside.vectors.widths == {"angle": 1, "text": 7}
    np.testing.assert_allclose(batch.vectors[0], [3, *vectors[3]], rtol=1e-6)
    assert apart.vectors.widths == {"vectors": 7}
    np.testing.assert_allclose((load(apart, [2]).condition_images + 1) / 2 * 255, pixels[[2], None, ..., 0], atol=1e-4)
    np.save(tmp_path / "digits.npy", np.arange(1797))
    rows = open_data(Digits(conditions=str(tmp_path / "digits.npy")))
    assert load(rows, [7, 1796]).vectors.flatten().tolist() == [7, 1796]


def rewritten(**changed):
    """The rows of the table with other values in the first."""
    rows = [{"file_name": name, "size": int(name[2])} for name in NAMES]
    return [rows[0] | changed, *rows[1:]]


@pytest.mark.parametrize(
    ("settings", "rows", "says"),
    [
        ({}, rewritten()[1:], "table.csv has no row for b/3.png"),
        ({}, [*rewritten(), {"file_name": "c.png", "size": 1}], "has a row for c.png, which is not an image"),
        ({}, [*rewritten(), rewritten()[0]], "table.csv has 4 rows of file_name, and names 3 files"),
        ({}, rewritten(size="red"), "size of b/3.png is 'red'; it must be a finite number"),
        ({}, rewritten(size="nan"), "size of b/3.png is 'nan'; it must be a finite number"),
        ({}, rewritten(size=""), "size of b/3.png is ''; it must be a finite number"),
        ({}, [{"id": 1, "size": 2}] * 3, "table.csv has no column file_name: there are id, size"),
        ({}, [row | {"": 3} for row in rewritten()], "must have a row of names, no two alike"),
        ({}, [row | {"image": 3} for row in rewritten()], "a condition cannot be called image, which means something"),
        ({"conditions": "long.csv"}, None, "long.csv has a row with more cells than columns: b/3.png, 3, ['5']"),
        ({"conditions": "alike.csv"}, None, "alike.csv must have a row of names, no two alike, and rows of cells"),
        ({"conditions": "empty.csv"}, None, "empty.csv must have a row of names, no two alike, and rows of cells"),
        ({"conditions": "complex.npy"}, None, "complex of a/1.png is '0j'; it must be a finite number"),
        ({"conditions": "scalar.npy"}, None, "scalar has 1 rows, and there are 3 images"),
        ({"conditions": "huge.npy"}, None, "huge of a/1.png is '1e+300'; it must be a finite number"),
        ({**MASKS, "condition_range": [5, 5]}, None, "data.condition_range is [5, 5]; it must rise"),
        ({"condition_range": [0, 5]}, None, "data.condition_range is of data.condition_images, and there are none"),
        ({"condition_columns": ["sise"]}, rewritten(), "table.csv has no column sise: did you mean size?"),
        ({}, [{"file_name": name} for name in NAMES], "has no column of numbers beside file_name: there are file_name"),
        ({"conditions": "none.csv"}, None, "none.csv cannot be read as .csv, .npy or .npz: No such file or directory"),
        ({"conditions": "images/b/3.png"}, None, "images/b/3.png cannot be read as .csv, .npy or .npz"),
        ({"conditions": "two.npy"}, None, "two.npy: two has 2 rows, and there are 3 images"),
        ({"conditions": "bad.npy"}, None, "bad.npy: bad of a/2.png is 'inf'; it must be a finite number"),
        ({"condition_images": None, "condition_channels": 1}, None, "is 1: name data.condition_images, too"),
        ({"conditions": None, "condition_columns": ["size"]}, None, "is ['size']: name data.conditions, too"),
        ({"condition_images": "masks", "condition_channels": 0}, None, "data.condition_channels is 0, and data.cond"),
        ({**MASKS, "condition_images": "fewer"}, None, "data.condition_images: there is none for b/3.png"),
        ({**MASKS, "condition_images": "more"}, None, "data.condition_images: x.png belongs to no image"),
        ({**MASKS, "condition_images": "twice"}, None, "2 images are called a/1: --data.include chooses some"),
        ({**MASKS, "condition_images": "wide"}, None, "wide/a/1.png is 16x8, and images/a/1.png 8x8: they would be"),
        ({**MASKS, "condition_images": "nowhere"}, None, "data.condition_images: data.path nowhere is not there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_pair_is_named_in_one_line(folder, settings, rows, says):
    table(folder / "table.csv", rows)
    np.save("two.npy", np.zeros(2))
    np.save("bad.npy", np.array([0, np.inf, 1]))
    for name, array in (("complex", np.zeros(3, complex)), ("scalar", 3.0), ("huge", np.full(3, 1e300))):
        np.save(f"{name}.npy", array)
    for name, text in (("long", "file_name,size\nb/3.png,3,5\n"), ("alike", "file_name,a,a\nb/3.png,3,5\n"),
                       ("empty", "")):  # fmt: skip
        (folder / f"{name}.csv").write_text(text)
    for name, files in (("fewer", NAMES[1:]), ("more", [*NAMES, "x.png"]), ("twice", [*NAMES, "a/1.mask.png"]),
                        ("wide", NAMES)):  # fmt: skip
        for file in files:
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16 if name == "wide" else 8, 8)).save(folder / name / file)
    with pytest.raises(UsageError) as caught:
        open_data(images(**{"conditions": "table.csv"} | settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_have_one_order_and_rows_one_precision(folder):
    """However the file is written. Seconds since 1970 do not fit into float32."""
    rows = [{"file_name": name, "b": 1_700_000_000 + int(name[2]), "a": int(name[2])} for name in NAMES]
    table(folder / "table.csv", rows)
    first = open_data(images(conditions="table.csv"))
    table(folder / "table.csv", [{name: row[name] for name in ("a", "file_name", "b")} for row in rows])
    second = open_data(images(conditions="table.csv"))
    assert first.fingerprint() == second.fingerprint()
    assert list(first.vectors.widths) == ["a", "b"]
    scaled = Scale.of(first.vectors).scaled(load(first, range(3)).vectors)
    torch.testing.assert_close(scaled[:, 0], scaled[:, 1])


def test_names_pair_that_differ_after_a_dot_and_labels_are_those_of_images(folder):
    for i in range(3):
        for root, suffix in (("frames", "png"), ("edges", "bmp")):
            (folder / root).mkdir(exist_ok=True)
            Image.new("L", (8, 8), 10 + i if root == "edges" else i).save(folder / root / f"frame.{i:04d}.{suffix}")
    (folder / "frames/labels.csv").write_text(
        "file_name,label\n" + "".join(f"frame.{i:04d}.png,{i}\n" for i in range(3))
    )
    dataset = open_data(images(path="frames", labels=None, condition_channels=1, condition_images="edges"))
    assert levels(dataset) == ([0, 1, 2], [10, 11, 12])
    assert dataset.class_names == ("0", "1", "2")
    some = open_data(images(path="both", include="a/*.in.png", condition_channels=1, condition_images="*.mask.png"))
    assert levels(some) == ([1, 2], [10, 20])


def test_rows_of_training_images_are_not_those_of_others(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(1797))
    config = Digits(conditions=str(tmp_path / "rows.npy"))
    assert load(open_data(config), [5]).vectors.item() == 5
    with pytest.raises(UsageError, match=r"rows.npy has its rows in the order of the training images, and not .* test"):
        open_data(config, "test")


def test_an_unreadable_condition_image_is_named_or_its_image_left_out(folder):
    (folder / "masks/a/2_mask.png").write_text("nothing")
    with pytest.raises(UsageError, match=r"masks/a/2_mask.png cannot be read as an image"):
        open_data(images(**MASKS))
    dataset = open_data(images(**MASKS, on_error="skip", conditions="table.csv"))
    assert levels(dataset) == ([1, 3], [10, 30])
    assert load(dataset, [1]).vectors.tolist() == [[150, -3]]


def test_vectors_are_scaled_by_what_was_trained_on():
    rows = np.random.default_rng(0).normal(3, 20, (500, 3)).astype(np.float32)
    rows[:, 1] = 5
    scale = Scale.of(Vectors({"a": 1, "b": 2}, rows))
    scaled = scale.scaled(torch.from_numpy(rows))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0]))
    assert scale.scaled(torch.tensor([[0.0, 6.0, 0.0]]))[0, 1] == 1  # what never changed is only shifted


# --- networks ---------------------------------------------------------------------------------------------------------


def config(name, **data):
    return config_of({"data": {"source": "memory", "image_size": 8, **data}, "model": {"network": name}})


def given(n):
    generator = torch.Generator().manual_seed(2)
    return {"vector": torch.randn(n, 5, generator=generator), "image": torch.randn(n, 2, 8, 8, generator=generator),
            "low_res": torch.randn(n, 1, 4, 4, generator=generator), "y": torch.arange(n) % 2}  # fmt: skip


@EACH
def test_every_network_takes_conditions_and_starts_without_them(name):
    torch.manual_seed(0)
    network = config(name, low_res_size=4, condition_channels=2).network(3, vector_size=5)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0])
    assert (network(x, t, **given(4)) == 0).all()
    assert all((p == 0).all() for p in network.vector_emb.parameters())
    moved(network)
    out = network(x, t, **given(4))
    for name, value in given(4).items():
        other = given(4) | {name: value.roll(1, 0)}
        assert (network(x, t, **other) - out).abs().amax((1, 2, 3)).min() > 1e-5, name
    one = network(x[2:3], t[2:3], **{name: value[2:3] for name, value in given(4).items()})
    torch.testing.assert_close(one, out[2:3], atol=1e-5, rtol=1e-4)
    dropped = drop(given(4), torch.tensor([True, False, True, False]))
    again = drop({name: value.roll(1, 0) if name != "low_res" else value for name, value in given(4).items()},
                 torch.tensor([True, False, True, False]))  # fmt: skip
    gone, still = network(x, t, **dropped), network(x, t, **again)
    assert torch.equal(gone[[0, 2]], still[[0, 2]])  # what was dropped does not matter, nor is it NaN
    torch.testing.assert_close(gone[[1, 3]], out[[1, 3]], atol=1e-5, rtol=1e-4)
    gone.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@EACH
def test_one_hot_vectors_are_classes(name):
    """With the same weights, dropped ones too. (A transformer's row for no class is the bias of its vectors.)"""
    torch.manual_seed(0)
    by_class = moved(config(name).network(3))
    settings = {"data": {"source": "memory", "image_size": 8}, "model": {"network": name, "class_cond": False}}
    by_vector = config_of(settings).network(0, vector_size=3)
    weights = by_class.state_dict()
    [table] = [key for key in weights if "label_emb" in key or "embedding_table" in key]
    rows = weights.pop(table)
    bias = rows[3] if len(rows) > 3 else torch.zeros(rows.shape[1])
    weights |= {"vector_emb.weight": (rows[:3] - bias).T, "vector_emb.bias": bias}
    by_vector.load_state_dict(weights)
    process, y = config(name).diffusion.process(), torch.tensor([0, 1, 2, -1, 1])
    vector = torch.nn.functional.one_hot(y.clamp(min=0), 3).float()
    vector = vector if len(rows) > 3 else drop({"vector": vector}, y < 0)["vector"]
    vector[y < 0] = 0 if len(rows) > 3 else torch.nan
    x, noise, t = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.arange(5) * 200
    losses = [training_losses(process, model, x, t, noise, "rescaled_mse")["loss"]
              for model in (partial(by_class, y=y), partial(by_vector, vector=vector))]  # fmt: skip
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vector": None}, "condition vectors of 5 numbers and images of 3 channels, and the call gives 0 and 3"),
        ({"vector": torch.zeros(4, 6)}, "gives 6 and 3"),
        ({"image": None}, "gives 5 and 1"),
        ({"y": None}, "the model has 3 classes, and the call gives no labels y"),
    ],
)
@EACH
def test_a_call_without_what_the_network_needs_is_refused(name, change, says):
    network = config(name, low_res_size=4, condition_channels=2).network(3, vector_size=5)
    call = {key: value for key, value in (given(4) | change).items() if value is not None}
    with pytest.raises(UsageError, match=says):
        network(torch.randn(4, 1, 8, 8), torch.zeros(4), **call)


class Recording(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Conv2d(1, 2, 1), []

    def forward(self, x, t, **given):
        self.seen.append(given)
        return self.layer(x)


def test_images_and_condition_images_are_mirrored_together_and_dropped_with_the_rest():
    from diffusion.training.step import TrainingStep

    network, x = Recording(), torch.rand(32, 1, 4, 4) * 2 - 1
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    step = TrainingStep(network, config("unet").diffusion.process(), optimizer, random_flip=True, label_dropout=0.25,
                        gradient_accumulation=2, accelerator=Accelerator(cpu=True))  # fmt: skip
    draws = step.draws(0, 32, (1, 4, 4))
    step(x, torch.arange(32), vector=x.mean((2, 3)), image=2 * x, low_res=x[..., ::2, ::2])
    seen = {name: torch.cat([given[name] for given in network.seen]) for name in network.seen[0]}
    flipped = torch.where(draws.flip.view(-1, 1, 1, 1), x.flip(-1), x)
    gone = draws.dropped
    assert 0 < gone.sum() < 32
    assert torch.equal(seen["image"][~gone], 2 * flipped[~gone])
    assert torch.equal(seen["vector"][~gone], x.mean((2, 3))[~gone])
    assert seen["image"][gone].isnan().all()
    assert seen["vector"][gone].isnan().all()
    assert (seen["y"] == torch.where(gone, -1, torch.arange(32))).all()
    small = x[..., ::2, ::2]
    assert torch.equal(
        seen["low_res"], torch.where(draws.flip.view(-1, 1, 1, 1), small.flip(-1), small)
    )  # never dropped


@EACH
def test_conditions_train(name):
    """The new layers learn: the loss falls where the condition is the image."""
    torch.manual_seed(0)
    made = config_of({"data": {"source": "memory", "image_size": 8, "condition_channels": 1},
                      "model": {"network": name, "class_cond": False},
                      "train": {"lr": 2e-3, "optimizer": "adamw", "warmup_steps": 0}})  # fmt: skip
    network = made.network(0)
    step = build_step(made, network, made.diffusion.process(), Accelerator(cpu=True))
    x = Digits().open().images[:64].float() / 127.5 - 1
    losses = [step(x, image=x).losses.mean().item() for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_columns_of_a_table_are_conditions(tmp_path):
    """Numbers, vectors such as embeddings, and a second column of images."""
    datasets = pytest.importorskip("datasets")
    from diffusion.data.sources.huggingface import HuggingFace

    rows = {"image": [Image.new("L", (8, 8), i) for i in range(4)],
            "depth": [Image.new("L", (8, 8), 10 * i) for i in range(4)],
            "text": [[i, -i, 0.5] for i in range(4)], "angle": [0.0, 1.0, 2.0, 3.0], "name": list("abcd")}  # fmt: skip
    kinds = {"image": datasets.Image(), "depth": datasets.Image()}
    table = datasets.Dataset.from_dict(rows)
    for column, kind in kinds.items():
        table = table.cast_column(column, kind)
    table.save_to_disk(tmp_path / "table")
    settings = dict(path=str(tmp_path / "table"), image_size=8, channels=1, condition_images="depth",
                    condition_channels=1)  # fmt: skip
    dataset = open_data(HuggingFace(**settings, condition_columns=["angle", "text"]))
    assert levels(dataset) == ([0, 1, 2, 3], [0, 10, 20, 30])
    assert dataset.vectors.widths == {"angle": 1, "text": 3}
    assert load(dataset, [3]).vectors.tolist() == [[3, 3, -3, 0.5]]
    for columns, says in ((["angel"], "is angel; it must be one of .*did you mean angle"),
                          (["name"], "name of row 0 is 'a'; it must be a finite number")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            open_data(HuggingFace(**settings, condition_columns=columns))
