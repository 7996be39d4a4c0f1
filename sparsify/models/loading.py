"""Load a causal language model and its tokenizer from disk: the shipped one, a Hugging Face folder or id, a GGUF file.

Never touches the network: an id must be in the local Hugging Face cache.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.errors import ModelError, TextError

TINY_LM = Path(__file__).parent / "tiny_lm"
"""The shipped model: 11M parameters, 32K context; its README says how it was made."""

HELDOUT_TEXT = TINY_LM / "heldout.txt"
"""Text that the shipped model was never trained on."""


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and a name for reports."""

    model: nn.Module
    tokenizer: Any
    name: str


def load_model(name: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Loaded:
    """Load `name`: None for the shipped model, the path of a folder or GGUF file, or the id of a cached model.

    Raises ModelError if nothing loadable is there.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place, options = _locate(TINY_LM if name is None else name)
    try:
        with _model_errors(name or "tiny-lm"):
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, attn_implementation="sdpa", local_files_only=True, **options)
    except SafetensorError as error:
        raise ModelError(f"model {str(name or 'tiny-lm')!r} cannot be loaded: {_broken_weights(place)} is not whole "
                         f"({error}). Download or copy it again.") from error
    tokenizer = _load_tokenizer(place, options)
    if place == str(TINY_LM):
        title = "tiny-lm"
    else:
        title = options.get("gguf_file") or (Path(place).resolve().name if Path(place).is_dir() else place)
    return Loaded(model.to(device).eval(), tokenizer, title)


def load_config(name: str | Path | None = None) -> Any:
    """The configuration of a model, found as `load_model` finds it, without its weights. Raises ModelError."""
    from transformers import AutoConfig

    place, options = _locate(TINY_LM if name is None else name)
    with _model_errors(name or "tiny-lm"):
        return AutoConfig.from_pretrained(place, local_files_only=True, **options)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model, found as `load_model` finds it. Raises ModelError."""
    return _load_tokenizer(*_locate(name))


def read_text(path: str | Path) -> str:
    """A text file. Raises TextError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"text {str(path)!r} cannot be read ({error.strerror}). "
                        "Give the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"text {str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}). "
                        "Give a plain text file.") from error


def _locate(name: str | Path) -> tuple[str, dict[str, str]]:
    """Where transformers shall look, and the extra arguments it needs there."""
    path = Path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {str(name)!r} is a file but no .gguf file. "
                             "Give the folder that holds config.json.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path), {}
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), {"gguf_file": files[0].name}
        raise ModelError(f"model {str(name)!r} holds no config.json and {len(files)} GGUF files. "
                         "Give a Hugging Face model folder, or the path of one GGUF file.")
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ModelError(f"model {str(name)!r} does not exist. Give a model folder, a GGUF file, or the id of a model "
                         "in the local Hugging Face cache.")
    return str(name), {}


def _broken_weights(place: str) -> Path:
    """The first file of weights that cannot be opened: the error of safetensors does not name it."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    folder = Path(place) if Path(place).is_dir() else Path(
        cached_file(place, "config.json", local_files_only=True)).parent
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                continue
        except SafetensorError:
            return file
    return folder


def _load_tokenizer(place: str, options: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    with _model_errors(place):
        return AutoTokenizer.from_pretrained(place, local_files_only=True, **options)


@contextmanager
def _model_errors(name: str | Path) -> Iterator[None]:
    """Turn what transformers raises for a bad model into ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, struct.error) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {str(name)!r} cannot be loaded: {reason} Give a folder with a causal language model, "
                         "a GGUF file, or the id of a model in the local Hugging Face cache.") from error
