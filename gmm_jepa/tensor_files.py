"""Tensors on disk: safetensors, or torch's archives of plain values, which are never unpickled.

To write aside is up to the caller (`gmm_jepa.files.written_aside`). Whatever the libraries make of
a full disk is an `OSError` here.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmm_jepa.errors import InputError, first_line, require


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        path: of the file.
        tensors: anywhere, with any strides.
        metadata: what else the file says of itself.

    Raises:
        OSError: it cannot be written.
        ImportError: safetensors is absent.
    """
    safetensors = require("safetensors.torch", extra="train")
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        safetensors.save_file(held, str(path), metadata=None if metadata is None else {**metadata})
    except require("safetensors", extra="train").SafetensorError as error:
        raise OSError(f"{path}: {first_line(error)}") from error


def read_tensors(
    path: str | PathLike[str], refusal: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, in memory of their own.

    Raises:
        InputError: the file cannot be read; the message has `refusal` and the reason.
        ImportError: safetensors is absent.
    """
    safetensors = require("safetensors", extra="train")
    if Path(path).is_dir():
        raise InputError(f"{path}: {refusal} (a folder)")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: {refusal} ({first_line(error)})") from error


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts and lists of tensors and plain values by `torch.save`.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # What the archive says when it is closed unfinished hides why it is.
            if isinstance(error.__context__, OSError):
                raise OSError(f"{path}: {error.__context__}") from error
            raise


def read_state(path: str | PathLike[str], refusal: str) -> Any:
    """Read what `save_state` wrote, on the CPU.

    Raises:
        InputError: there is no such file, or it holds anything but tensors and plain values; the
            message has `refusal` and the reason then.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError:  # torch's words are advice on how to unpickle it all the same
        reason = "not of tensors and plain values alone; nothing was unpickled"
        raise InputError(f"{path}: {refusal} ({reason})") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(f"{path}: {refusal} ({first_line(error)})") from None
