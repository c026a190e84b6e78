"""Configurations that no person would write: each is a run or one clear line, never a traceback, never a hang.

Sixty in every test run; `DIFFUSION_FUZZ_CASES=2000 python -m pytest tests/runs/test_fuzz.py` tries others, and more.
"""

import io
import os
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train
from diffusion.commands.terminal import exit_code
from diffusion.config.schema import all_settings

CASES = os.environ.get("DIFFUSION_FUZZ_CASES")
SECONDS = 120
"""A case that takes longer hangs."""

sizes = st.sampled_from([1, 2, 3, 4, 8, 16])
bad_numbers = st.sampled_from([0, -1, -7, 1.5, 10**10, 10**30, float("nan"), float("inf"), -float("inf")])
junk = st.one_of(
    bad_numbers, st.none(), st.booleans(), st.text(max_size=6), st.lists(st.integers(-2, 40), max_size=3),
    st.sampled_from(["", "no", "null", "1e-3", "0x10", "1_000", "[1", "{a: 1}", "- 1", "!!python/name:os.system", "~",
                     "ddim5", "9" * 5000, "é\n", "\x00", "*x", "&a b", "--", "=", "%"]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
names = st.sampled_from(["digits", "mnist", "folder", "linear", "cosine", "epsilon", "x_start", "previous_x", "learned",
                         "learned_range", "fixed_small", "fixed_large", "mse", "rescaled_mse", "kl", "rescaled_kl",
                         "uniform", "loss_second_moment", "ddpm", "ddim", "bf16", "fp16", "no", "stop", "continue",
                         "skip", "fail", "constant", "zero", "fixup", "all_zero", "muon", "adamw", "wsd", "min_snr",
                         "v", "dpmpp", "heun", "ode", "flow", "gvp", "velocity", "score", "dit",
                         "logit_normal", "arrays", "none", "prefix", "unet",
                         "memory"])  # fmt: skip
rates = st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0, -0.1, 1e-3, 1e30])
fitting: dict = {
    "data.image_size": st.one_of(sizes, st.none(), st.lists(st.sampled_from([0, 1, 4, 8, 9]), max_size=4)),
    "data.held_out": rates, "data.background": sizes, "data.max_pixels": sizes,
    "data.include": st.sampled_from(["*.png", "a/*", "", "[", "**"]),
    "data.range": st.lists(st.sampled_from([0, 255, 0.0, 1.0, -1, 1e300, float("nan")]), max_size=3),
    "data.channels": sizes, "data.low_res_size": sizes, "data.workers": st.just(1),
    "model.model_channels": st.sampled_from([32, 64, 33]), "model.num_res_blocks": st.sampled_from([1, 2]),
    "model.channel_mult": st.lists(st.sampled_from([1, 2, 0.5]), max_size=3),
    "model.attention_resolutions": st.lists(st.sampled_from([1, 2, 4]), max_size=2),
    "model.num_heads": sizes, "model.num_heads_upsample": sizes, "model.num_head_channels": sizes,
    "diffusion.steps": sizes, "diffusion.respacing": sizes, "train.batch_size": sizes,
    "train.gradient_accumulation": sizes, "train.lr_base_width": st.sampled_from([32, 64, 33]),
    "train.ema_rates": st.lists(rates, max_size=2), "train.warmup_steps": sizes,
    "train.ema_lengths": st.lists(rates, max_size=2), "train.compile": st.just(False), "train.log_every": sizes,
    "train.max_skipped": sizes, "train.steps": st.sampled_from([1, 2, 3]), "sample.n": sizes, "sample.every": sizes,
    "sample.steps": st.one_of(sizes, st.sampled_from(["ddim2", "1,1", ""])), "checkpoint.every": sizes,
    "checkpoint.keep_last": sizes, "checkpoint.keep_every": sizes, "data.path": st.sampled_from([".", "/nowhere", ""]),
    "train.init_from": st.sampled_from([".", "/nowhere", ""]),
    "train.log_with": st.lists(st.sampled_from(["tensorbord", "aim", ""]), max_size=2),
    "data.conditions": st.sampled_from(["angles.csv", "/nowhere", ""]), "data.condition_channels": sizes,
    "data.condition_images": st.sampled_from(["*.png"]),
    "data.condition_columns": st.lists(st.sampled_from(["angle", "size"]), max_size=2),
    "data.condition_range": st.lists(st.sampled_from([0, 255, 0.0, 1.0]), max_size=3),
    "sample.guide_between": st.lists(rates, max_size=3),
    "train.location": rates, "train.scale": rates,
    "diffusion.s_max": st.sampled_from([1.0, 0.9, 2.0]),
    "model.patch_size": sizes, "model.hidden_size": st.sampled_from([4, 6, 32]),
    "model.depth": st.sampled_from([1, 2, 0]),
    "model.mlp_ratio": rates, "train.history": sizes, "sample.order": sizes, "sample.clip_denoised": st.booleans(),
}  # fmt: skip
fitting |= dict.fromkeys(
    ["data.random_flip", "data.unbounded", "data.allow_change", "model.use_new_attention_order", "model.conv_resample",
     "model.resblock_updown", "model.use_scale_shift_norm", "model.use_checkpoint", "model.class_cond",
     "diffusion.rescale_timesteps", "diffusion.zero_terminal_snr", "train.ema_warmup",
     "model.use_norm"], st.booleans())  # fmt: skip
fitting |= dict.fromkeys(
    ["data.source", "data.on_error", "data.labels", "data.subset", "data.image_column",
     "data.label_column", "diffusion.schedule", "diffusion.prediction", "diffusion.variance",
     "diffusion.loss", "diffusion.weighting", "train.optimizer",
     "train.lr_schedule", "train.precision", "model.init", "model.network", "train.timestep_sampler", "sample.sampler"],
    names)  # fmt: skip
fitting |= dict.fromkeys(
    ["model.dropout", "train.lr", "train.weight_decay", "train.grad_clip", "train.label_dropout",
     "train.scalar_lr_factor", "sample.guidance", "train.seed",
     "train.momentum", "train.decay_share", "train.uniform_prob", "diffusion.gamma", "diffusion.gap", "sample.eta"],
    rates)  # fmt: skip
OWNERS = {
    "train.history": {"timestep_sampler": "loss_second_moment"}, "train.decay_share": {"lr_schedule": "wsd"},
    "train.uniform_prob": {"timestep_sampler": "loss_second_moment"}, "train.momentum": {"optimizer": "muon"},
    "diffusion.gamma": {"weighting": "min_snr", "loss": "mse"}, "sample.eta": {"sampler": "ddim"},
    "sample.order": {"sampler": "ipndm"}, "train.location": {"timestep_sampler": "logit_normal"},
    "train.scale": {"timestep_sampler": "logit_normal"}, "diffusion.gap": {"loss": "consistency"},
    "diffusion.s_max": {"schedule": "flow", "variance": "fixed_small", "prediction": "velocity"},
    **{f"model.{name}": {"network": "dit"} for name in ("patch_size", "hidden_size", "depth", "mlp_ratio")},
}  # fmt: skip
"""The components that settings belong to, which are mostly chosen with them."""
COSTLY = {
    "model.num_res_blocks",
    "data.workers",
    "sample.n",
    "train.steps",
    "diffusion.steps",
    "data.path",
    "train.init_from",
}
"""Of these, even junk that is accepted would take the machine or the day."""


def setting(key):
    value = fitting[key] if key in COSTLY else st.one_of(fitting[key], fitting[key], junk)
    return st.tuples(st.just(key), value)


keys = st.sampled_from(sorted(fitting))
some = st.lists(keys.flatmap(setting), max_size=4)
strange = st.one_of(st.sampled_from(["model.dropot", "train", "data", "x", "", "model.", ".steps", "train.steps.x"]),
                    st.text(max_size=5))  # fmt: skip
CHEAP = {"train": {"steps": 2, "batch_size": 8}, "sample": {"n": 2, "steps": 2}, "diffusion": {"steps": 10}}


@st.composite
def command_lines(draw):
    """The text of a file, and flags."""
    tree = {name: dict(values) for name, values in CHEAP.items()}
    for key, value in draw(some):
        section, name = key.split(".")
        if draw(st.integers(0, 4)):
            tree.setdefault(section, {}).update(OWNERS.get(key, {}))
        tree.setdefault(section, {})[name] = value
    if draw(st.integers(0, 9)) == 0:
        tree[draw(strange)] = draw(junk)
    text = yaml.safe_dump(tree)
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at]
            + draw(st.sampled_from(["\t", ":", "{", "]", "\x00", "- ", "'", "\n\n", "a: 1", "\ufeff"]))
            + text[at:]
        )
    flags = []
    for key, value in draw(some):
        flags += draw(st.sampled_from([[f"--{key}", str(value)], [f"--{key}={value}"]]))
    if draw(st.integers(0, 9)) == 0:
        flags.insert(draw(st.integers(0, len(flags))), "--" + draw(strange))
    return text, flags


def hangs(number, frame):
    raise AssertionError(f"it takes more than {SECONDS} seconds")


@given(command_lines())
@example(("diffusion: {prediction: []}", []))
@example(("", ["--checkpoint.every", "9" * 5000]))
@settings(max_examples=int(CASES or 60), deadline=None, derandomize=CASES is None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_any_configuration_is_a_run_or_one_clear_line(case):
    text, flags = case
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "run.yaml").write_text(text)
            sys.argv = ["train.py", "--config", f"{folder}/run.yaml", "--out", f"{folder}/out", *flags]
            with redirect_stdout(out), redirect_stderr(err):
                code = exit_code(train.main)
            if code == 0:
                assert "is done" in out.getvalue()
                assert list(Path(folder, "out/checkpoints").iterdir())
            else:
                assert code == 2
                last = err.getvalue().splitlines()[-1]
                assert last.startswith("train.py: ")
                assert 20 < len(last) < 700, last
                assert "Traceback" not in err.getvalue()
                assert "<class" not in last
                assert "object at 0x" not in last
    finally:
        signal.alarm(0)
        sys.argv = argv
        AcceleratorState._reset_state(reset_partial_state=True)


def test_every_key_is_tried():
    assert set(fitting) == set(all_settings())
