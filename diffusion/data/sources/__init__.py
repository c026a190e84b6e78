"""Data sources. Each is one module: a subclass of `DataConfig` with the source's own fields and `open`."""

from diffusion.data.base import DataConfig
from diffusion.data.sources.arrays import Arrays, Memory
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.huggingface import HuggingFace
from diffusion.data.sources.torchvision import CIFAR10, CIFAR100, MNIST, SVHN, CelebA, FashionMNIST

SOURCES: dict[str, type[DataConfig]] = {
    "digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10, "cifar100": CIFAR100,
    "svhn": SVHN, "celeba": CelebA, "folder": Folder, "arrays": Arrays, "huggingface": HuggingFace, "memory": Memory,
}  # fmt: skip
