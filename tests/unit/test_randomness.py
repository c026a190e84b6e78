import torch

from diffusion.randomness import generator_for, image_noise, seed_for

CPU = torch.device("cpu")


def test_keys_give_different_seeds_and_the_same_key_the_same():
    keys = [(0, "step", 1), (0, "step", 2), (1, "step", 1), (0, "epoch", 1), (0, 1, "step"), (0, "step", 1, 0)]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert seed_for(0, "step", 1) == seed_for(0, "step", 1)


def test_a_seed_stays_what_it_is():
    """A new version that draws other numbers would spoil every run that it continues."""
    assert seed_for(0, "step", 1) == 7353712510126883786
    assert torch.randint(1000, (3,), generator=generator_for("cpu", 0, "step", 1)).tolist() == [537, 718, 101]


def test_the_noise_of_a_picture_depends_on_its_index_alone():
    whole = image_noise(range(50), (2, 4), CPU, seed=7, step=3)
    for part in (range(1), range(15, 17), range(16, 32), range(49, 50), range(5, 41)):
        assert torch.equal(image_noise(part, (2, 4), CPU, 7, 3), whole[part.start : part.stop])
    assert len(torch.unique(whole)) == whole.numel()


def test_seeds_steps_and_starts_do_not_share_noise():
    noises = [image_noise(range(4), (8,), CPU, seed, step) for seed in (0, 1) for step in (0, 1, "x_T")]
    assert len(torch.unique(torch.stack(noises))) == 6 * 4 * 8
    big = image_noise(range(4000), (10,), CPU, 0, "x_T")
    assert abs(big.mean().item()) < 0.02
    assert abs(big.std().item() - 1) < 0.02


def test_two_sizes_of_a_seed_share_no_noise():
    """Else the first stage of a cascade would tell the second what to draw."""
    small, large = (image_noise(range(16), (1, size, size), torch.device("cpu"), 0, "x_T") for size in (4, 8))
    assert not torch.isin(small, large).any()
