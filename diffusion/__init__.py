"""Diffusion models after Nichol & Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models"."""

from diffusion.errors import UsageError
from diffusion.models.unet import UNetModel
from diffusion.process import GaussianDiffusion
from diffusion.schedule import Schedule

__version__ = "0.1.0"
__all__ = ["GaussianDiffusion", "Schedule", "UNetModel", "UsageError", "__version__"]
