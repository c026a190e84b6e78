"""Runs with conditions: trained, continued, sampled and scored; and guidance by other networks."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import script, tensors
from PIL import Image
from test_trainer import assert_same_bits, small
from torch import nn

import diffusion
import evaluate
import sample
from diffusion import UsageError
from diffusion.commands import convert
from diffusion.data.base import open_data
from diffusion.data.conditions import Scale
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.metrics.base import Reference, Subject
from diffusion.run.loaded import Run
from diffusion.training.trainer import Trainer

N = 60
QUICK = dict(train__steps=6, train__batch_size=16, checkpoint__every=3, sample__n=4, sample__steps=3, sample__every=0,
             train__label_dropout=0.3)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits with their left halves as a second channel, an angle, and a vector of three numbers."""
    digits, path = Digits().open(), tmp_path_factory.mktemp("data") / "data.npz"
    images = digits.images[:N, 0].numpy()
    rng = np.random.default_rng(0)
    np.savez(path, images=np.stack([images, images * (np.arange(8) < 4)], -1), labels=digits.labels[:N].numpy(),
             angle=np.linspace(-60, 60, N), text=rng.normal(size=(N, 3)))  # fmt: skip
    return str(path)


def config(data, **changes):
    source = dict(data__source="arrays", data__path=data, data__channels=1, data__image_size=8, data__conditions=data,
                  data__condition_channels=1)  # fmt: skip
    return small(**QUICK | source | changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A conditional run whose network is not at its start."""
    out = tmp_path_factory.mktemp("conditions") / "run"
    Trainer(config(data, train__lr=1e-2), out).run()
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of the same process and shape, without any condition."""
    out = tmp_path_factory.mktemp("plain") / "run"
    unconditional = QUICK | dict(train__label_dropout=0.0, model__class_cond=False)
    Trainer(small(**unconditional), out).run()
    return out


def test_a_run_with_conditions_is_continued_to_the_bit(run, data, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step_00000006")
    Trainer(config(data, train__lr=1e-2), again).run()
    assert_same_bits(tensors(again), tensors(run))
    state = json.loads((run / "checkpoints/step_00000006/state.json").read_text())
    assert state["vectors"]["widths"] == {"angle": 1, "text": 3}
    assert diffusion.load(run).vectors == Scale.of(open_data(config(data).data).vectors)


def test_grids_show_condition_images_beside_what_was_drawn(run, monkeypatch, capsys, tmp_path):
    loaded = diffusion.load(run)
    own = {name: value for name, value in loaded.of_data(4).items() if name != "y"}
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--n", 4, "--out", tmp_path / "a.png")
    assert code == 0, err
    for path in (tmp_path / "a.png", run / "samples/step_00000006.png"):
        sheet = np.asarray(Image.open(path))
        assert sheet.shape[1] > 1.9 * sheet.shape[0]  # two by two, each of twice the width
        half, other = sheet[3:33:4, 3:33:4], sheet[3:33:4, 35:65:4]
        if path.name == "a.png":
            assert abs(((own["image"][0, 0] + 1) * 127.5).numpy() - half).max() <= 1
        assert (half[:, 4:] == 0).all()  # the right half of a left half
        assert (other[:, 4:] != 0).any()


def test_the_network_is_given_vectors_in_units_of_the_training_images(run, data, tmp_path):
    """In training, on held-out images, and in sampling; a guide is given its own units."""
    seen, scale = [], diffusion.load(run).vectors

    def watched(network):
        network.register_forward_pre_hook(lambda n, args, given: seen.append(given["vector"]), with_kwargs=True)

    trainer = Trainer(config(data, train__label_dropout=0.0, train__steps=4, data__held_out=0.2), tmp_path / "run")
    watched(trainer.network)
    trainer.run()
    rows = torch.cat(seen)
    assert abs(rows.mean(0)).max() < 0.5
    assert (rows.std(0) - 1).abs().max() < 0.4
    assert rows.abs().max() < 4
    seen.clear()
    loaded, (mean, std) = diffusion.load(run), (scale.mean[0], scale.std[0])
    arrays = dict(np.load(data))
    np.savez(tmp_path / "other.npz", **arrays | {"angle": 2 * arrays["angle"]})
    Trainer(config(str(tmp_path / "other.npz"), train__steps=1), tmp_path / "guide").run()
    guide = diffusion.load(tmp_path / "guide")
    for network in (loaded.network, guide.network):
        watched(network)
    loaded.sample(1, conditions={"angle": mean + 2 * std}, guide=guide, guidance=2.0)
    assert seen[0][0, 0].item() == pytest.approx(2)
    assert seen[1][0, 0].item() == pytest.approx(1, abs=0.05)


def test_other_columns_are_not_the_same_run(run, data):
    with pytest.raises(UsageError, match=r"data.condition_columns was \[\] and is \[.angle.\]"):
        Trainer(config(data, data__condition_columns=["angle"]), run)


def test_weights_are_taken_over_with_the_scale_that_they_know(run, data, tmp_path):
    arrays = dict(np.load(data))
    np.savez(tmp_path / "other.npz", **arrays | {"angle": arrays["angle"] * 10})
    other = config(str(tmp_path / "other.npz"), train__init_from=str(run))
    trainer = Trainer(other, tmp_path / "run")
    assert trainer.data.vectors == diffusion.load(run).vectors
    trainer.close()


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_conditions_reach_the_image_that_they_are_given_for(run):
    loaded = diffusion.load(run)
    own = loaded.of_data(5)
    assert own["angle"].shape == (5, 1)
    assert own["image"].shape == (5, 1, 8, 8)
    conditions = {name: value for name, value in own.items() if name != "y"}
    by_default = loaded.sample(5)
    in_batches = loaded.sample(5, classes=own["y"], conditions=conditions, batch_size=2)
    torch.testing.assert_close(by_default, in_batches, atol=1e-5, rtol=1e-4)
    for name, value in conditions.items():
        changed = loaded.sample(5, classes=own["y"], conditions=conditions | {name: value.flip(0)})
        differs = (changed - by_default).abs().amax((1, 2, 3))
        assert (differs[[0, 4]] > 0).all(), name
        assert differs[2] == 0
    in_turn = loaded.sample(4, classes=[1], conditions=conditions | {"angle": [10, 20]})
    assert torch.equal(in_turn, loaded.sample(4, classes=[1], conditions=conditions | {"angle": [10, 20, 10, 20]}))


def from_command(run, monkeypatch, capsys, tmp_path, *flags, n=8):
    out = tmp_path / "x.npz"
    out.unlink(missing_ok=True)
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--n", n, "--npz", "--out", out, *flags)
    assert code == 0, err
    return torch.from_numpy(np.load(out)["arr_0"])[..., 0]


def test_the_command_gives_numbers_ranges_files_and_images(run, data, monkeypatch, capsys, tmp_path):
    loaded, text, shapes = diffusion.load(run), np.arange(6.0).reshape(2, 3), np.load(data)["images"][:2, ..., 1]
    np.save(tmp_path / "text.npy", text)
    (tmp_path / "halves").mkdir()
    for i, half in enumerate(shapes):
        Image.fromarray(half).save(tmp_path / f"halves/{i}.png")
    rest = ["--condition", f"text={tmp_path / 'text.npy'}", "--condition", f"image={tmp_path / 'halves'}"]
    image = torch.from_numpy(shapes[:, None]).float() / 127.5 - 1
    for word, angles, classes in (
        ("angle=30", [30], "3"), ("angle=30,-10", [30, -10], "3"), ("angle=-45:45", np.linspace(-45, 45, 8), "3"),
        ("angle=-45:45", [-45, -45, -15, -15, 15, 15, 45, 45], "3,5"),
    ):  # fmt: skip
        drawn = from_command(run, monkeypatch, capsys, tmp_path, *rest, "--condition", word, "--classes", classes)
        wanted = loaded.sample(8, classes=classes, conditions={"angle": angles, "text": text, "image": image})
        assert torch.equal(drawn, ((wanted[:, 0] + 1) * 127.5).round().clamp(0, 255).byte()), word
    one = from_command(run, monkeypatch, capsys, tmp_path, "--condition", "angle=1", n=2)
    assert one.shape == (2, 8, 8)  # the rest is the data's


def test_two_ranges_span_a_grid_and_a_table_gives_every_column(tmp_path, monkeypatch, capsys):
    arrays = dict(images=Digits().open().images[:32].numpy(), a=np.arange(32.0), b=-np.arange(32.0))
    np.savez(tmp_path / "d.npz", **arrays)
    source = dict(data__source="arrays", data__path=str(tmp_path / "d.npz"), data__channels=1, data__image_size=8,
                  data__conditions=str(tmp_path / "d.npz"), model__class_cond=False)  # fmt: skip
    Trainer(small(**QUICK | source | dict(train__lr=1e-2)), tmp_path / "run").run()
    loaded = diffusion.load(tmp_path / "run")
    drawn = from_command(tmp_path / "run", monkeypatch, capsys, tmp_path, "--condition", "b=0:1", "--condition",
                         "a=0:30", n=9)  # fmt: skip
    wanted = loaded.sample(9, conditions={"b": [0, 0.5, 1] * 3, "a": [0, 0, 0, 15, 15, 15, 30, 30, 30]})
    assert torch.equal(drawn, ((wanted[:, 0] + 1) * 127.5).round().clamp(0, 255).byte())
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["b", "other", "a"], [0.5, "x", 3], [1, "y", 4]])
    drawn = from_command(tmp_path / "run", monkeypatch, capsys, tmp_path, "--condition", tmp_path / "t.csv", n=2)
    wanted = loaded.sample(2, conditions={"a": [3, 4], "b": [0.5, 1]})
    assert torch.equal(drawn, ((wanted[:, 0] + 1) * 127.5).round().clamp(0, 255).byte())
    argv = ["--ckpt", tmp_path / "run", "--condition", "a=0:30", "--n", 9, "--captions"]
    code, out, err = script(sample, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert Image.open(out.split(": ")[1].strip()).height >= 3 * (64 + 2 * 14)  # a grid with two lines of text each


def test_the_values_of_samples_are_written_beside_them_and_can_be_trained_on(run, monkeypatch, capsys, tmp_path):
    text = "text=" + str(tmp_path / "text.npy")
    np.save(tmp_path / "text.npy", np.arange(6.0).reshape(2, 3))
    flags = ["--condition", "angle=-45:45:3", "--condition", text, "--classes", "3"]
    drawn = from_command(run, monkeypatch, capsys, tmp_path, *flags, n=5)
    arrays = dict(np.load(tmp_path / "x.npz"))
    assert arrays["angle"].ravel().tolist() == [-45, 0, 45, -45, 0]
    assert arrays["text"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    path = str(tmp_path / "x.npz")
    again = open_data(Arrays(path=path, channels=1, image_size=8, conditions=path))
    assert torch.equal(again.images[:, 0], drawn)
    assert again.vectors.widths == {"angle": 1, "text": 3}
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--images", "--out", tmp_path / "i", *flags)
    assert code == 0, err
    files = open_data(Folder(path=str(tmp_path / "i"), channels=1, image_size=8, conditions="conditions.csv"))
    assert len(files) == 3  # the number of the range
    assert files.vectors.widths == {"angle": 1, "text_0": 1, "text_1": 1, "text_2": 1}
    assert files.vectors.rows[:, 0].tolist() == [-45, 0, 45]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--condition", "angel=3"], "angel is not a condition of"),
        (["--condition", "angel=3"], "did you mean angle?"),
        (["--condition", "angle=red"], "condition angle is ['red']; it must be rows of 1 finite numbers"),
        (["--condition", "angle=nan"], "condition angle is ['nan']; it must be rows of 1 finite numbers"),
        (["--condition", "angle=1:x"], "condition angle is ['1', 'x']; it must be rows of 1 finite numbers"),
        (["--condition", "angle=1:2:x"], "condition angle is ['x']; it must be rows of 1 finite numbers"),
        (["--condition", "text=1,2"], "condition text is ['1', '2']; it must be rows of 3 finite numbers"),
        (["--condition", "nowhere.csv"], "nowhere.csv cannot be read as .csv, .npy or .npz"),
        (["--condition", "angle=nowhere.npy"], "nowhere.npy cannot be read as .csv, .npy or .npz"),
        (["--condition", "wrong.csv"], "wrong.csv has no column angle: there are size"),
        (["--condition", "image=wide.npy"], "image has images of (1, 8, 16), or others than can be: "),
        (["--condition", "image=nowhere"], "data.path nowhere is not there"),
        (["--condition", "angle=1", "--condition", "angle=1:2"], "--condition angle=1:2: angle is given twice"),
        (["--condition", "text=0:1"], "condition text is "),
        (["--condition", "angle=tall.npy"], "condition angle is "),
        (["--condition", "text=tall.npy"], "condition text is "),
        (["--guide", "nowhere", "--guidance", "2"], "nowhere does not exist"),
        (["--guide_ema", "none"], "--guide_ema is set, and --guidance is 1, which is none: add --guidance 2"),
        (["--guide_ema", "0.7", "--guidance", "2"], "--ema is 0.7"),
        (["--guide_between", "[1,5]"], "--guide_between is set, and --guidance is 1, which is none"),
        (["--guidance", "2", "--guide_between", "[5,1]"], "guide_between is [5, 1], and the steps' noise"),
        (["--guidance", "2", "--guide_between", "3"], "guide_between is 3; it must"),
        (["--guidance", "2", "--guide_between", "[1e6,2e6]"], "guide_between is [1e+06, 2e+06], and the steps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_conditions_and_guides_get_one_line(run, monkeypatch, capsys, tmp_path, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("size\n3\n")
    np.save(tmp_path / "wide.npy", np.zeros((2, 8, 16, 1), np.uint8))
    np.save(tmp_path / "tall.npy", np.zeros((3, 6)))
    flags = [*flags, "--classes", "1"] if "image=wide.npy" in flags else flags
    code, out, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--n", 2, *flags)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_run_without_conditions_says_so(plain, monkeypatch, capsys):
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", plain, "--condition", "angle=3")
    assert code == 2
    assert "angle is not a condition of" in err
    assert "it has none" in err


def test_images_from_python_are_checked(run):
    loaded = diffusion.load(run)
    as_tensor, as_array = torch.zeros(2, 1, 8, 8), np.zeros((2, 1, 8, 8))
    drawn = [loaded.sample(2, classes=1, conditions={"image": image, "angle": 1, "text": [1, 2, 3]})
             for image in (as_tensor, as_array, as_tensor.double())]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    white = [loaded.sample(2, classes=1, conditions={"image": image, "angle": 1, "text": [1, 2, 3]})
             for image in (as_tensor + 1, torch.full((2, 1, 8, 8), 255, dtype=torch.uint8))]  # fmt: skip
    assert torch.equal(*white)
    for image in (None, "x", as_tensor[:0], as_tensor * torch.nan, as_tensor + 200, as_tensor[:, :, :4], loaded):
        with pytest.raises(UsageError, match=r"image has images of .*, or others than can be"):
            loaded.sample(2, classes=1, conditions={"image": image})
    by_path = loaded.sample(2, guide=run / "checkpoints/step_00000003", guidance=2.0)
    assert torch.equal(by_path, loaded.sample(2, guide=diffusion.load(run / "checkpoints/step_00000003"), guidance=2.0))


def test_a_cascade_whose_first_stage_has_other_conditions_is_refused(run, tmp_path):
    Trainer(small(**QUICK | dict(data__low_res_size=4, train__steps=1)), tmp_path / "up").run()
    upsampler = diffusion.load(tmp_path / "up")
    assert upsampler.sample(2).shape == (2, 1, 8, 8)  # of the data, shrunk
    with pytest.raises(UsageError, match=r"low_res has images of \(1, 8, 8\), or others than can be"):
        upsampler.sample(2, low_res=diffusion.load(run))


def test_square_signals_from_python_are_pointed_out(tmp_path):
    settings = {"train.batch_size": 8, "model.channel_mult": [1], "model.attention_resolutions": [1]}
    with pytest.warns(
        UserWarning, match=r"\(8, 16, 16\), signals of 16 channels; grey images are \(N, 1, height, width"
    ):
        diffusion.train(torch.zeros(8, 16, 16), tmp_path / "run", settings).close()


def test_data_from_python_have_conditions_too(tmp_path):
    images, sizes = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), np.arange(32)
    settings = {"train.steps": 2, "train.batch_size": 16, "sample.n": 2, "sample.steps": 2, "train.warmup_steps": 0}
    mapping = {"images": images, "image": torch.rand(32, 2, 8, 8) * 2 - 1, "size": sizes}
    trainer = diffusion.train(mapping, tmp_path / "run", settings)
    assert torch.equal(trainer.dataset.images[:, 1:], mapping["image"])
    torch.testing.assert_close(trainer.dataset.images[:, :1], images / 127.5 - 1)
    trainer.run()
    run = diffusion.load(tmp_path / "run")
    assert run.sample(3, conditions={"size": 4, "image": torch.zeros(1, 2, 8, 8)}).shape == (3, 1, 8, 8)
    with pytest.raises(UsageError, match=r"image not given, and taken from the run's data: data.source is memory"):
        run.sample(3, conditions={"size": 4})
    np.save(tmp_path / "sizes.npy", sizes)
    table = settings | {"data.conditions": str(tmp_path / "sizes.npy"), "train.label_dropout": 0.5}
    diffusion.train(images, tmp_path / "other", table).close()
    with pytest.raises(UsageError, match=r"label_dropout is 0.5, and there are no classes and no conditions to drop"):
        diffusion.train(images, tmp_path / "third", {"train.label_dropout": 0.5, "train.batch_size": 8})


@pytest.mark.parametrize("form", ["openai", "diffusers"])
def test_conditions_are_not_lost_in_another_format(run, monkeypatch, capsys, tmp_path, form):
    code, _, err = script(convert, monkeypatch, capsys, form, run, "--out", tmp_path / "out")
    assert code == 2
    assert f"has condition vectors or images, which {form} cannot express" in err


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["itself", "past", "average", "plain"])
def test_a_guide_of_scale_one_is_none_to_the_bit_and_others_extrapolate(run, plain, guide):
    loaded = diffusion.load(run)
    others = {"past": (run / "checkpoints/step_00000003", None), "average": (run, "none"), "plain": (plain, None)}
    other = diffusion.load(*others.get(guide, (run, None)))
    without = loaded.sample(4)
    assert torch.equal(loaded.sample(4, guide=other, guidance=1.0), without)
    guided = loaded.sample(4, guide=other, guidance=3.0)
    if guide == "itself":  # a network that is extrapolated from itself
        torch.testing.assert_close(guided, without, atol=1e-5, rtol=1e-4)
    else:
        assert (guided - without).abs().max() > 1e-3
    # At scale 0 the images are the guide's: given the same conditions, those that it has.
    own = loaded.of_data(4)
    classes = {"classes": own.pop("y")} if other.class_names else {}
    theirs = other.sample(4, **classes, conditions=own if other.vectors.widths else {})
    if loaded.config.diffusion.variance == other.config.diffusion.variance:
        torch.testing.assert_close(loaded.sample(4, guide=other, guidance=0.0), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by_run", [False, True], ids=["dropped conditions", "another run"])
def test_only_the_noise_levels_between_are_guided(run, by_run):
    loaded = diffusion.load(run).with_sampling(steps="logsnr8")
    flags = {"guide": diffusion.load(run, "none")} if by_run else {}
    process, calls = loaded.config.sampling_process(), []
    levels = process.tables["sigma"] / process.tables["alpha"]
    everywhere = loaded.sample(4, guidance=2.0, **flags)
    assert torch.equal(everywhere, loaded.sample(4, guidance=2.0, guide_between=[0, 1e9], **flags))
    inside = loaded.sample(4, guidance=2.0, guide_between=[float(levels[2]), float(levels[4])], **flags)
    assert (inside - everywhere).abs().max() > 1e-4
    assert (inside - loaded.sample(4)).abs().max() > 1e-4
    networks = [loaded.network, *(guide.network for guide in flags.values())]
    for network in networks:
        network.register_forward_pre_hook(lambda network, inputs: calls.append(1))
    loaded.sample(1, guidance=2.0, guide_between=[float(levels[2]) * 0.999, float(levels[4]) * 1.001], **flags)
    assert len(calls) == 8 + 3  # outside, the guide is not evaluated


def test_a_run_without_classes_is_guided_by_its_past(plain):
    loaded, past = diffusion.load(plain), diffusion.load(plain / "checkpoints/step_00000003")
    assert (loaded.sample(4, guide=past, guidance=2.0) - loaded.sample(4)).abs().max() > 1e-4
    with pytest.raises(UsageError, match=r"guidance is 2.0; without train.label_dropout or a guide, it can only be 1"):
        loaded.sample(4, guidance=2.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(data__image_size=16), r"images \[1, 16, 16\], and .* \[1, 8, 8\]"),
        (dict(diffusion__prediction="epsilon"), r"diffusion.prediction epsilon, and .* v"),
        (dict(diffusion__schedule="linear"), r"diffusion.schedule linear, and .* cosine"),
        (dict(model__class_cond=True), r"classes \[.0., .*\], and .* \[\]"),
        (dict(data__low_res_size=4), r"low_res \[1, 4, 4\], and .* null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_guide_of_another_shape_or_process_is_refused(plain, tmp_path, changes, says):
    other = small(**QUICK | dict(train__label_dropout=0.0, model__class_cond=False, train__steps=1) | changes)
    Trainer(other, tmp_path / "run").run()
    with pytest.raises(UsageError, match=f"the guide .* has {says}"):
        diffusion.load(plain).sample(2, guide=diffusion.load(tmp_path / "run"), guidance=2.0)


# --- metrics ----------------------------------------------------------------------------------------------------------


class Copying(nn.Module):
    """A model whose image is its condition."""

    def forward(self, x, t, y, vector, image):
        return image


def test_metrics_use_the_conditions_of_the_data(data):
    """A model that returns them draws the images that they are from, as often as each class is there."""
    settings = config(data, diffusion__prediction="x_start", diffusion__variance="fixed_small")
    dataset = open_data(settings.data)
    dataset.images[:, 1] = dataset.images[:, 0]
    state = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    scored = Run(settings, Copying(), dataset.class_names, vectors=Scale.of(dataset.vectors))
    subject = Subject(scored, dataset, state, Reference(dataset, state.device, "pixels"), 20)
    order = np.argsort(dataset.labels.numpy(), kind="stable")[(2 * np.arange(20) + 1) * N // 40]
    assert torch.equal(subject.samples, dataset.images[order, :1])
    assert torch.equal(subject.given(range(20))["y"], dataset.labels[order])


def test_a_conditional_run_is_scored_and_guided_from_the_command(run, monkeypatch, capsys, tmp_path):
    argv = ["--ckpt", run, "--metric", "frechet,nearest", "--features", "pixels", "--n", 20, "--out"]
    for name, more in (("a", []), ("b", ["--guide_ema", "none", "--guidance", "2", "--sampler", "ddim"])):
        code, _, err = script(evaluate, monkeypatch, capsys, *argv, tmp_path / f"{name}.json", *more)
        assert code == 0, err
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a["frechet"] != b["frechet"]
    assert b["settings"]["sampler"] == "ddim"
    assert b["settings"]["guide"] == diffusion.load(run, "none").saved.fingerprint("none")
    assert b["settings"]["evaluations"] == 2 * b["settings"]["steps"] or b["settings"]["evaluations"] == 100
    code, out, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--steps", 3, "--n", 8)
    assert code == 0, err
    assert "bits per dimension: 8 images" in out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--data.condition_columns", "[angle]"], "the data's conditions are angle; those of"),
        (["--data.condition_channels", "0", "--data.channels", "2"], "the model's images are (1, 8, 8)"),
        (["--data.source", "digits"], "condition images are {}, the model's {'image': (1, 8, 8)}"),
    ],
    ids=["columns", "channels", "source"],
)
def test_data_of_other_conditions_are_not_scored(run, monkeypatch, capsys, changes, says):
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--steps", 3, "--n", 8, *changes)
    assert code == 2
    assert says in err
