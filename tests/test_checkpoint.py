import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import Trap

from diffusion import UsageError
from diffusion.config.schema import Config
from diffusion.run import checkpoint
from diffusion.training.step import TrainingStep


def training(network):
    moments = {i: {"step": torch.tensor(10.0), "exp_avg": p * 2, "exp_avg_sq": p**2}
               for i, p in enumerate(network.state_dict().values())}  # fmt: skip
    return {"step": {"optimizer": moments, "scaler": None, "importance": None}}


def step_of(network):
    """A part that the state can be given to."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    return TrainingStep(network, Config().diffusion.process(), optimizer)


def forge(folder, name, content):
    """Replace a file as somebody would who also corrects its checksum."""
    (folder / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, folder / name)
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture
def run(tmp_path):
    """A run of digits with checkpoints at steps 9 and 10, and the network saved there."""
    torch.manual_seed(0)
    config = Config()
    network = config.network(10)
    averages = {0.999: {name: p + 1 for name, p in network.state_dict().items()}}
    (tmp_path / "run").mkdir()
    for step in (9, 10):
        checkpoint.save(
            checkpoint.checkpoint_folder(tmp_path / "run", step), step=step, config=config,
            class_names=tuple("0123456789"), weights=network.state_dict(), averages=averages,
            training=training(network),
        )  # fmt: skip
    return tmp_path / "run", network


def test_what_is_saved_comes_back(run):
    path, network = run
    saved = checkpoint.open_checkpoint(path)
    assert (saved.step, saved.config, saved.class_names) == (10, Config(), tuple("0123456789"))
    weights, average = saved.weights(), saved.ema(0.999)
    for name, value in network.state_dict().items():
        assert torch.equal(weights[name], value)
        assert torch.equal(average[name], value + 1)
    step = step_of(network)
    saved.restore({"step": step})
    moments = step.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i]["exp_avg"], p * 2) for i, p in enumerate(network.parameters()))
    loaded = saved.network(weights)
    y = torch.tensor([3, 4])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    assert torch.equal(loaded(x, t, y), network(x, t, y))


def test_a_checkpoint_is_named_or_the_newest_taken(run):
    path, _ = run
    assert checkpoint.open_checkpoint(path).step == 10
    assert checkpoint.open_checkpoint(path / "checkpoints/step_00000009").step == 9


def test_what_was_left_by_a_kill_is_not_a_checkpoint(run):
    path, _ = run
    shutil.copytree(path / "checkpoints/step_00000010", path / "checkpoints/.step_00000011.tmp")
    assert checkpoint.open_checkpoint(path).step == 10


@pytest.mark.parametrize(
    "name", ["state.json", "config.yaml", "model.safetensors", "ema_0.999.safetensors", "training.pt", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_names_the_file(run, name, damage):
    path, network = run
    file = path / "checkpoints/step_00000010" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 3 if damage == "cut" else 0])

    with pytest.raises(UsageError, match=rf"step_00000010 is not whole: {name} is (missing|damaged)") as caught:
        checkpoint.open_checkpoint(path / "checkpoints/step_00000010")
    assert "\n" not in str(caught.value)
    # Of the run, the one before it is taken, and what is wrong is said.
    saved = checkpoint.open_checkpoint(path)
    assert (saved.step, saved.passed_over) == (9, ((path / "checkpoints/step_00000010", str(caught.value)),))
    assert torch.equal(saved.weights()["out.2.weight"], network.state_dict()["out.2.weight"])


def test_another_architecture_is_told_apart(run):
    path, _ = run
    saved = checkpoint.open_checkpoint(path)
    deeper = dataclasses.replace(saved.config, model=dataclasses.replace(saved.config.model, num_res_blocks=2))
    with pytest.raises(UsageError, match=r"of another architecture: input_blocks.*; and \d+ more of \d+$"):
        dataclasses.replace(saved, config=deeper).network(saved.weights())


@pytest.mark.parametrize("edit", [("num_heads: 2", "num_heads: 1"), ("  num_heads: 2\n", ""), ("seed: 0", "seed: 1")])
def test_a_configuration_that_was_edited_in_a_checkpoint_is_refused(run, edit):
    path, _ = run
    file = path / "checkpoints/step_00000010/config.yaml"
    assert edit[0] in file.read_text()
    file.write_text(file.read_text().replace(*edit))
    with pytest.raises(UsageError, match=r"config\.yaml is damaged: it is not what was written there"):
        checkpoint.open_checkpoint(path / "checkpoints/step_00000010")


@pytest.mark.parametrize(("path", "says"), [("nowhere", "nowhere is not there"), ("", "no run that has saved one")])
def test_where_there_is_no_checkpoint_it_says_so(tmp_path, path, says):
    with pytest.raises(UsageError, match=says):
        checkpoint.open_checkpoint(tmp_path / path)


@pytest.mark.parametrize("content", [{}, [1], {"step": {"optimizer": {}, "scaler": None, "importance": None}}])
def test_an_optimizer_without_its_state_is_damaged(run, content):
    path, network = run
    forge(path / "checkpoints/step_00000010", "training.pt", content)
    with pytest.raises(UsageError, match=r"training\.pt does not hold what a run of this network saves"):
        checkpoint.open_checkpoint(path).restore({"step": step_of(network)})


def test_an_optimizer_of_another_network_is_refused(run):
    path, network = run
    other = training(network)
    other["step"]["optimizer"][3]["exp_avg"] = torch.zeros(5)
    forge(path / "checkpoints/step_00000010", "training.pt", other)
    with pytest.raises(UsageError, match=r"a tensor is torch\.float32 \(5,\), not"):
        checkpoint.open_checkpoint(path).restore({"step": step_of(network)})


@pytest.mark.parametrize("step", [-1, 1.5, "10", None, 9])
def test_a_step_that_cannot_be_is_refused(run, step):
    path, _ = run
    folder = path / "checkpoints/step_00000010"
    state = json.loads((folder / "state.json").read_text()) | {"step": step}
    forge(folder, "state.json", json.dumps(state).encode())
    with pytest.raises(UsageError, match=r"state\.json cannot be used: step is|give the folder its name back"):
        checkpoint.open_checkpoint(folder)


def test_a_format_from_the_future_is_refused(run):
    path, _ = run
    file = path / "checkpoints/step_00000010/state.json"
    forge(file.parent, file.name, json.dumps(json.loads(file.read_text()) | {"format": 99}).encode())
    with pytest.raises(UsageError, match="has format 99; this version reads 6"):
        checkpoint.open_checkpoint(file.parent)


def test_nothing_in_a_checkpoint_is_run(run, tmp_path):
    path, network = run
    forge(path / "checkpoints/step_00000010", "training.pt", {"step": Trap(tmp_path / "sprung")})
    with pytest.raises(UsageError, match=r"training\.pt cannot be read as plain tensors: it holds code or objects"):
        checkpoint.open_checkpoint(path).restore({"step": step_of(network)})
    assert not (tmp_path / "sprung").exists()


def test_every_flipped_bit_and_every_cut_is_found(run):
    """At 100 random places of all files: nothing of a checkpoint is believed that is not what was written."""
    folder = run[0] / "checkpoints/step_00000010"
    files = sorted(folder.iterdir())
    rng = np.random.default_rng(0)
    for i in range(100):
        file = files[i % len(files)]
        content = file.read_bytes()
        place = int(rng.integers(len(content)))
        flipped = bytes([content[place] ^ (1 << int(rng.integers(8)))])
        file.write_bytes(content[:place] + flipped + content[place + 1 :] if i % 4 else content[:place])
        with pytest.raises(UsageError, match=r"is not whole|has format|give the folder its name back"):
            checkpoint.open_checkpoint(folder)
        file.write_bytes(content)
    assert checkpoint.open_checkpoint(folder).step == 10


def test_the_checksums_are_those_of_sha256sum(run):
    folder = run[0] / "checkpoints/step_00000010"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [2, 4, 6, 8, 10]), (2, 0, [8, 10]), (1, 4, [4, 8, 10]), (9, 0, [2, 4, 6, 8, 10]), (1, 5, [10])],
)
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every, left):
    for step in (2, 4, 6, 8, 10):
        checkpoint.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, keep_last, keep_every)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_{step:08d}" for step in left]


def test_a_save_that_fails_leaves_nothing_behind(run, monkeypatch):
    path, network = run

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(path.rglob("*"))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(checkpoint.checkpoint_folder(path, 11), step=11, config=Config(), class_names=(),
                        weights=network.state_dict(), averages={}, training={})  # fmt: skip
    assert sorted(path.rglob("*")) == before
