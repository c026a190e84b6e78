"""Reading tensors from strangers' files without running anything that is in them."""

import argparse
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffusion.errors import UsageError, one_line, refusing


def load_plain(path: Path) -> Any:
    """Load plain data and dense tensors that `torch.save` wrote. No code in the file is run, and nothing takes more
    memory than the file. Raises UsageError for anything else."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save does not do")
        # Checkpoints of DiT hold settings as a Namespace, and torch warns of files that it then refuses.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        _check_dense(loaded)
        return loaded
    except Exception as error:  # torch raises many types for broken files
        unsafe = "Unsupported" in str(error) or "GLOBAL" in str(error)
        reason = "it holds code or objects, of which nothing was run" if unsafe else one_line(error)
        raise UsageError(f"{path} cannot be read as plain tensors: {reason}") from None


def _check_dense(value: object, name: str = "a tensor") -> None:
    """Raise ValueError if a tensor is sparse, nested or quantized, or claims more elements than it stores."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{name} is not dense ({value.layout}, {value.dtype}, {value.device})")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} has {value.numel()} elements, and stores fewer")
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_dense(part, str(key))
    elif isinstance(value, list | tuple | set):
        for part in value:
            _check_dense(part, name)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file into memory. Raises UsageError if it is damaged."""
    with refusing(lambda reason: f"{path} cannot be read: {reason}"):
        return safetensors.torch.load(path.read_bytes())
