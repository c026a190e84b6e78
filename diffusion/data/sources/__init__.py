"""Data sources. Each is one module: a subclass of `DataConfig` with the source's own fields and `open`."""

from diffusion.data.base import DataConfig
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.torchvision import CIFAR10, MNIST

SOURCES: dict[str, type[DataConfig]] = {"digits": Digits, "mnist": MNIST, "cifar10": CIFAR10, "folder": Folder}
