"""Encoding an image, filling in a part of it, and captions."""

import ast
import itertools
import re

import numpy as np
import torch
from helpers import ROOT, process

from diffusion.run.grids import captioned
from diffusion.samplers import ddim, ddim_reverse


def of_the_docs(name):
    """A function that docs/sampling.md defines."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), re.DOTALL):
        for node in ast.parse(block).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                found = {"torch": torch, "count": itertools.count}
                exec(ast.unparse(node), found)
                return found[name]
    raise LookupError(name)


inpaint = of_the_docs("inpaint")


def noise_of(shape):
    return lambda i: torch.randn(shape, generator=torch.Generator().manual_seed(i))


def of_normal(gaussian):
    """The exact epsilon for data that are standard normal: x_t is, too, at every t."""
    alphas = torch.from_numpy(gaussian.tables["alphas_cumprod"]).float()
    return lambda x, t: torch.sqrt(1 - alphas[t.long()])[:, None, None, None] * x


def fixed(steps=50):
    return process(steps=1000, respacing=str(steps), variance="fixed_small", rescale=False)


def index_model(gaussian, model):
    """A model of process timesteps, although a sampler gives it the network's."""
    inputs = {float(value): i for i, value in enumerate(gaussian.network_t(torch.arange(gaussian.num_timesteps)))}
    return lambda x, t: model(x, torch.tensor([inputs[float(value)] for value in t]))


def test_encoding_and_decoding_give_an_image_back():
    gaussian = fixed(200)
    model = index_model(gaussian, of_normal(gaussian))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_T = ddim_reverse(gaussian, model, x, clip_denoised=False)
    torch.testing.assert_close(x_T, x, atol=0.03, rtol=0.03)  # the flow of normal data stands still
    torch.testing.assert_close(
        ddim(gaussian, model, x_T, noise_of(x.shape), clip_denoised=False), x, atol=0.05, rtol=0.05
    )


def test_what_is_known_stays_and_the_rest_is_drawn_like_the_data():
    gaussian = fixed()
    model = index_model(gaussian, of_normal(gaussian))
    known, mask = torch.full((400, 1, 2, 2), 0.5), torch.tensor([[True, False], [True, False]])
    filled = inpaint(gaussian, model, known, mask, noise_of(known.shape), resample=2)
    assert (filled[..., 0] == 0.5).all()
    drawn = filled[..., 1].clamp(-1, 1)
    assert abs(drawn.mean()) < 0.08
    assert drawn.std() > 0.5


def test_resampling_lets_the_parts_fit():
    """Data whose pixels are all alike: only with resampling does the unknown half take the level of the known one."""
    gaussian = fixed(30)
    alphas = torch.from_numpy(gaussian.tables["alphas_cumprod"]).float()

    def model(x, t):  # the exact epsilon for images of one level, of which each is as likely
        a = alphas[t][:, None, None, None]
        level = (x.mean((1, 2, 3), keepdim=True) / torch.sqrt(a)).clamp(-1, 1)
        return (x - torch.sqrt(a) * level) / torch.sqrt(1 - a)

    known, mask = torch.full((50, 1, 4, 4), 0.6), torch.arange(4) < 2
    errors = [(inpaint(gaussian, index_model(gaussian, model), known, mask, noise_of(known.shape), resample=n)[..., 2:]
               - 0.6).abs().mean() for n in (1, 8)]  # fmt: skip
    assert errors[1] < errors[0]
    assert errors[1] < 0.1


def test_captions_stand_under_their_images():
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    sheet = np.asarray(captioned(images, 2, ["cat", "", "dog"]).convert("L"))
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    strips = [sheet[row * height + height - 12 : (row + 1) * height, col * width : (col + 1) * width]
              for row, col in ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert [bool((strip < 128).any()) for strip in strips] == [True, False, True]
