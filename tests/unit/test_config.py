import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
import torch
from helpers import ROOT, golden
from pydantic import Field

from diffusion import UsageError
from diffusion.commands.command_line import parse_command_line
from diffusion.config.fields import section
from diffusion.config.files import load_config, read_yaml, save_config
from diffusion.config.schema import Config, TrainConfig, shared_fields
from diffusion.data.sources import SOURCES
from diffusion.models.networks import NETWORKS
from diffusion.run.folder import mark_run

FILES = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/published").glob("*.yaml")])


def parse(*argv):
    return parse_command_line(argv).config


def test_the_default_is_the_digits_file():
    assert parse() == load_config(ROOT / "configs/digits.yaml") == Config()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_holds_what_differs_from_the_defaults_and_builds_its_network(path):
    written = read_yaml(path)
    defaults = Config().sections() | {"data": dataclasses.asdict(SOURCES[written["data"]["source"]]())}
    if network := written.get("model", {}).get("network"):
        defaults["model"] = dataclasses.asdict(NETWORKS[network]()) | {"network": "unet"}
    defaults["train"] |= {"momentum": 0.95, "weight_decay": 0.0}
    same = [f"{section}.{key}" for section, values in written.items() for key, value in values.items()
            if value == defaults[section][key]]  # fmt: skip
    assert same == ["data.source"]
    config = load_config(path)
    with torch.device("meta"):
        config.network(1000)


PUBLISHED = {  # millions of parameters, as the papers round them, and the golden name where the count is known
    "cifar10": (53, "cifar10_uncond"),
    "published/cifar10_uncond_vlb": (53, "cifar10_uncond"),
    "published/imagenet64_uncond": (121, "imagenet64_uncond"),
    "published/imagenet64_uncond_vlb": (121, "imagenet64_uncond"),
    "published/imagenet64_cond": (273, "imagenet64_cond"),
    "published/upsample_64_256": (280, "upsample_cond_256"),
    "published/lsun_bedroom": (114, "lsun_bedroom_256"),
    "published/adm_imagenet64_cond": (296, "adm_imagenet64_cond"),
    "published/adm_imagenet128_cond": (422, None),
    "published/adm_imagenet256_cond": (554, None),
    "published/adm_imagenet512_cond": (559, None),
    "published/adm_lsun": (553, "adm_lsun_256"),
    "published/adm_upsample_64_256": (312, None),
    "published/adm_upsample_128_512": (309, None),
    "published/dit_s2_imagenet256": (33, None),
    "published/dit_b2_imagenet256": (130, None),
    "published/dit_l2_imagenet256": (458, None),
    "published/dit_xl2_imagenet256": (675, None),
    "published/dit_xl2_imagenet512": (675, None),
}


def test_every_published_file_is_counted():
    assert {f"published/{path.stem}" for path in FILES if path.parent.name == "published"} == PUBLISHED.keys() - {
        "cifar10"
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_has_the_published_network(name):
    millions, exact = PUBLISHED[name]
    config = load_config(ROOT / f"configs/{name}.yaml")
    with torch.device("meta"):
        count = sum(p.numel() for p in config.network(1000).parameters() if p.requires_grad)
    assert round(count / 1e6) == millions
    if exact:
        assert count == golden("published_parameters.json")[exact]
    # The table of the docs says what the file says.
    row = next(row for row in (ROOT / "docs/published.md").read_text().splitlines() if f"configs/{name}.yaml`" in row)
    steps, batch, lr = (cell.strip() for cell in row.split("|")[3:6])
    assert f"{config.train.steps / 1000:g}K" in steps
    assert (int(batch), float(lr)) == (config.train.batch_size, config.train.lr)


def test_cifar10_is_the_published_run():
    config = load_config(ROOT / "configs/cifar10.yaml")
    assert (config.diffusion.steps, config.diffusion.schedule, config.model.dropout) == (4000, "cosine", 0.3)
    assert (config.train.lr, config.train.batch_size, config.train.ema_rates) == (1e-4, 128, (0.9999,))
    process = config.diffusion.process("")
    assert (process.prediction, process.variance_type) == ("epsilon", "learned_range")


def test_a_folder_may_have_the_name_of_a_section():
    assert parse_command_line(["--out", "data"]).out == Path("data")


def test_overrides_beat_the_file_and_both_beat_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  lr: 2e-4\n  steps: 7\nsample:\n  steps: 25\n")
    command = parse_command_line(["--config", str(file), "--train.steps", "9"])
    config, out = command.config, command.out
    assert (config.train.lr, config.train.steps, config.train.batch_size) == (2e-4, 9, Config().train.batch_size)
    assert config.sample.steps == 25
    assert str(out) == "runs/mine"
    assert parse_command_line(["--train.steps", "9", "--config", str(file)]).config == config


def test_another_source_is_another_source():
    for name, kind in SOURCES.items():
        for other in SOURCES.values():
            assert "source" not in shared_fields(kind(), other), name


def test_another_source_keeps_what_means_the_same_in_both(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  source: cifar10\n  path: x\n  random_flip: true\n  workers: 1\n")
    data = parse("--config", str(file), "--data.source", "folder").data
    assert (data.shape, data.workers, data.path, data.random_flip) == ((3, 32, 32), 1, None, True)
    assert parse("--data.source", "mnist").data.shape == (1, 28, 28)
    assert parse("--config", str(file), "--data.source", "folder", "--data.path", "y").data.path == "y"
    with pytest.raises(UsageError, match=r"data\.random_flip belongs to source cifar10, .*folder"):
        parse("--config", str(file), "--data.source", "mnist", "--data.random_flip", "true")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--sample.eta", "0.5"], "sample.eta belongs to sampler ddim, and sample.sampler is dpmpp"),
        (["--train.optimizer", "adamw", "--train.momentum", "0.5"], "train.momentum belongs to optimizer muon, and"),
        (["--train.decay_share", "0.2", "--train.lr_schedule", "cosine"], "belongs to lr_schedule wsd, and"),
        (["--diffusion.gamma", "3"], "diffusion.gamma belongs to weighting min_snr, and diffusion.weighting is none"),
        (["--train.history", "3"], "train.history belongs to timestep_sampler loss_second_moment, and"),
        (["--sample.sampler", "ddim", "--sample.eta", "2"], "sample.eta is 2; it must be from 0 to 1"),
        (["--sample.sampler", "ddim", "--sample.eta", "yes"], "sample.eta is yes; it must be of type float"),
        (["--sample.clip_denoisd", "true"], "did you mean sample.clip_denoised?"),
        (["--train.momentum", "1.5"], "train.momentum is 1.5; it must be from 0 to 1"),
        (["--train.optimizer", "mun"], "(did you mean muon?)"),
        (["--model.network", "unett"], "(did you mean unet?)"),
        (["--sample.eta", "[1"], "--sample.eta is '[1', which cannot be read"),
        (["--config", ""], "--config is ''"),
        (["--data.name", "digits"], "unknown key data.name"),
        (["--config", "cifar1"], "did you mean cifar10?"),
        (["--config", "cifar10", "--data.source", "cifar"], "did you mean cifar10?"),
    ],
)
def test_what_a_sampler_or_the_package_does_not_have_gets_the_nearest_name(argv, says):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert says in str(caught.value)


def test_shipped_configurations_are_found_by_name():
    assert parse("--config", "cifar10") == load_config(ROOT / "configs/cifar10.yaml")
    assert parse("--config", "adm_lsun") == load_config(ROOT / "configs/published/adm_lsun.yaml")
    assert parse_command_line(["--config", "mnist"]).out == Path("runs/mnist")


def test_a_folder_or_a_file_with_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()  # where somebody keeps the data
    assert parse("--config", "mnist").data.source == "mnist"
    (tmp_path / "cifar10").write_text("data: {source: digits}")
    with pytest.raises(UsageError, match=r"cifar10 ships with the package, and is a file here: write \./cifar10"):
        parse("--config", "cifar10")
    assert parse("--config", "./cifar10").data.source == "digits"


def test_the_nearest_setting_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  timesteps: uniform\n")
    with pytest.raises(UsageError, match=r"train\.timesteps: did you mean train\.(timestep_sampler|steps)"):
        load_config(tmp_path / "a.yaml")


def test_samplers_options_are_settings():
    flags = ["--sample.sampler", "ddim", "--sample.eta", "0.5", "--sample.clip_denoised", "false"]
    assert parse(*flags).sample.options == {"eta": 0.5, "clip_denoised": False}


def test_settings_of_a_component_are_those_of_its_section(tmp_path):
    """They are keys beside the others in files, flags and Python, and go when another component is chosen."""
    config = parse("--train.momentum", "0.9", "--train.weight_decay", "0.1")
    assert config.train.options == {"momentum": 0.9, "weight_decay": 0.1, "decay_share": 0.4}
    assert config.train.component("optimizer").keywords == {"momentum": 0.9, "weight_decay": 0.1}
    save_config(config, tmp_path / "config.yaml")
    assert "  momentum: 0.9\n" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config == Config(train=TrainConfig(momentum=0.9, weight_decay=0.1))
    other = parse("--config", str(tmp_path / "config.yaml"), "--out", "x", "--train.optimizer", "adamw").train
    assert other.options == {"weight_decay": 0.1, "decay_share": 0.4}
    assert dataclasses.replace(config.train, optimizer="adamw").options == other.options


def test_what_is_saved_loads_as_the_same(tmp_path):
    config = parse(
        "--train.lr", "1e-5", "--train.ema_rates", "[0.9, 0.99]", "--train.grad_clip", "0.5", "--train.precision", "no"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--train.stps", "3"], "unknown key train.stps: did you mean train.steps?"),
        (["--lr", "3"], "unknown key lr"),
        (["3"], "unrecognized arguments: 3"),
        (["--train.steps"], "--train.steps: expected one argument"),
        (["--train.steps", "many"], "train.steps is many; it must be of type integer"),
        (["--train.steps", "1.5"], "train.steps is 1.5; it must be of type integer"),
        (["--train.steps", "0"], "train.steps is 0; it must be greater than or equal to 1"),
        (["--train.lr", "-1"], "train.lr is -1; it must be greater than 0"),
        (["--train.lr", ".inf"], "train.lr is inf"),
        (["--train.ema_rates", "0.9"], "train.ema_rates is 0.9; it must be a list: [0.9]"),
        (["--train.ema_rates", "[1.0]"], "train.ema_rates are [1.0]"),
        (["--train.ema_rates", "[0.9,0.9]"], "train.ema_rates are [0.9, 0.9]; they must be different"),
        (["--train.gradient_accumulation", "3"], "train.gradient_accumulation 3 does not divide train.batch_size 64"),
        (["--data.channels", "5"], "data.channels is 5; it must be less than or equal to 4"),
        (["--diffusion.steps", str(10**30)], "it must be less than or equal to 100000"),
        (["--train.grad_clip", "true"], "train.grad_clip is true; it must be of type number or null"),
        (["--train.grad_clip", "0"], "train.grad_clip is 0; it must be greater than 0"),
        (["--train.grad_clip", ""], "train.grad_clip is empty; it must be of type number or null"),
        (["--train.steps", ""], "train.steps is empty; it must be of type integer"),
        (["--train.precision", "fp8"], "train.precision is fp8; it must be one of no, bf16, fp16"),
        (["--diffusion.schedule", "cosin"], "(did you mean cosine?)"),
        (["--diffusion.schedule", "linear", "--diffusion.steps", "20", "--sample.steps", "5"], "beta of 1"),
        (["--diffusion.respacing", "2000"], "2000 steps are more than the schedule's 1000"),
        (["--sample.steps", "2000"], "sample.steps: respacing '2000': 2000 steps are more than the schedule's 1000"),
        (["--data.image_size", "9"], "2 levels do not divide: the nearest that they do is 8x8"),
        (["--data.image_size", "1"], "2 levels do not divide: the nearest that they do is 2x2"),
        (["--data.source", "digit"], "(did you mean digits?)"),
        (["--data.source", "folder", "--data.path="], "data.path is ''; it must name a file or folder"),
        (["--train", "{}"], "--train is a section"),
        (["--train={'steps': null}"], "--train is a section"),
        (["--conf", "configs/digits.yaml"], "unknown key conf: did you mean config?"),
        (["--train.label_dropout", "1"], "train.label_dropout is 1; it must be less than 1"),
        (["--sample.guide_between", "[2,1]"], "sample.guide_between is [2, 1], and the steps' noise levels"),
        (["--data.low_res_size", "8"], "data.low_res_size is 8; it must be below data.image_size"),
        (["--model.num_head_channels", "48"], "model.num_head_channels is 48, which does not divide 32 channels"),
        (["--model.channel_mult", "[1,1.5]"], "each of which makes a multiple of 32"),
        (["--data.path", "x"], "data.path belongs to source"),
        (["--data.random_flip", "true"], "data.random_flip belongs to source"),
        (["--model.model_channels", "40"], "a multiple of 32, such as 32"),
        (["--model.attention_resolutions", "[4]"], "must be downsampling factors of 2 levels, 1, 2"),
        (["--model.num_heads", "3"], "model.num_heads is 3, which does not divide 32 channels"),
        (["--model.num_heads_upsample", "5"], "model.num_heads_upsample is 5, which does not divide 32"),
        (["--model.channel_mult", "[]"], "model.channel_mult is []"),
        (["--model.dropout", "1"], "model.dropout is 1; it must be less than 1"),
        (["--model.class_cond", "maybe"], "model.class_cond is maybe; it must be of type boolean"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_command_line_gets_one_line(argv, says):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  lrr: 1\n", "unknown key train.lrr: did you mean train.lr?"),
        ("trian:\n  lr: 1\n", "unknown key trian.lr: did you mean train.lr?"),
        ("train:\n  lr: fast\n", "train.lr is fast; it must be of type number"),
        ("train: [\n", "line 2"),
        ("train: 3\n", "must be made of sections"),
        ("out: elsewhere\n", "unknown key out"),
        ("train.lr: 0.5\n", "train.lr is to be in a section: write {train: {lr: ...}}"),
        ("sample: {steps: 0}\n", "sample.steps: respacing '0' is not understood"),
        ("sample: {steps: []}\n", "sample.steps: respacing []: timesteps must ascend"),
        ("train:\n  lr: 1e-3\n  lr: 1e-4\n", 'found duplicate key "lr"'),
        ("train:\n  lr: null\n", "train.lr is null"),
        ("- 1\n", "must be made of sections"),
        ("\x00", "is not YAML"),
        ("train:\n  lr: !!float x\n", "is not YAML"),
        ("model:\n  class_cond: !!bool maybe\n", "is not YAML"),
        ("train:\n  steps: !!timestamp x\n", "is not YAML"),
        ("train: !!omap [x]\n", "is not YAML"),
        ("train: !!pairs [x]\n", "is not YAML"),
        ("", "must be made of sections"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, text, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_former_component_had_is_dropped_where_it_was_the_default_one(tmp_path):
    for spelled in ("", "optimizer: muon, "):
        file = tmp_path / "mine.yaml"
        file.write_text(f"train: {{{spelled}momentum: 0.9, weight_decay: 0.1}}")
        train = parse("--config", str(file), "--train.optimizer", "adamw").train
        assert (train.optimizer, train.options["weight_decay"]) == ("adamw", 0.1)
        assert "momentum" not in train.options


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in dataclasses.fields(Config):
        for f in dataclasses.fields(part.default_factory):
            if f.name == "options":
                continue
            start = text.index(f"--{part.name}.{f.name} ", text.index("options:"))
            entry = text[start : text.index("default:", start)]
            assert len(entry.split()) > 3, entry


def test_a_runs_own_configuration_continues_that_run(tmp_path):
    save_config(Config(), tmp_path / "config.yaml")
    with pytest.raises(UsageError, match=r"config\.yaml: add --out with a folder for the run"):
        parse_command_line(["--config", str(tmp_path / "config.yaml")])
    mark_run(tmp_path, [])  # as a run that was killed before its first checkpoint has
    assert parse_command_line(["--config", str(tmp_path / "config.yaml")]).out == tmp_path


@pytest.mark.parametrize(
    ("value", "says"),
    [("b", "data.word is b; it must match pattern '^x+$'"), ("x" * 9, "at most 8 characters"), (3, "of type string")],
)
def test_what_is_wrong_with_a_section_of_ones_own_is_said(value, says):
    @section("data")
    class Mine:
        word: Annotated[str, Field(pattern="^x+$", max_length=8)] = "x"
        """a word"""

    with pytest.raises(UsageError) as caught:
        Mine(word=value)
    assert says in str(caught.value)
