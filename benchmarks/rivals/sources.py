"""Where rivals are found: one folder a rival under the folder of --sources, as its authors publish it.

A folder may hold a file ORIGIN (repository and commit); it is quoted beside the results. Nothing of a rival is edited:
it is imported from its folder, and what a rival lacks on this machine is the reason that it is absent.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A rival's module, and the folders under --sources that must be importable for it."""

    module: str
    folders: tuple[str, ...]


SOURCES = {
    "flashprefill": Source("flashprefill_native_forward", ("flashprefill/ops", "fla")),  # its decorators are fla-core's
    "flexprefill": Source("flex_prefill_attention", ("flexprefill/flex_prefill/ops",)),
    "minference": Source("block_sparse_flash_attention", ("minference/minference/ops",)),
    "pbs": Source("pbs_attn.src.pbs", ("pbs",)),
    "sla": Source("sparse_linear_attention.kernel", ("sla",)),
    "vsa": Source("block_sparse_attn_triton", ("vsa/fastvideo-kernel/python/fastvideo_kernel/triton_kernels",)),
    "fa4": Source("flash_attn.cute.interface", ("fa4", "fa4/nvidia_cutlass_dsl/dsl_packages")),
}


class Absent(Exception):
    """Why a rival does not take part."""


def load(name: str | None, root: Path | None) -> Any:
    """The module of a rival; None for what needs no source. Raises Absent."""
    if name is None:
        return None
    if root is None:
        raise Absent("no folder of sources: --sources or SPARSIFY_RIVALS")
    source = SOURCES[name]
    for folder in source.folders:
        path = str((root / folder).resolve())
        if not Path(path).is_dir():
            raise Absent(f"no {folder} in the folder of sources")
        if path not in sys.path:
            sys.path.insert(0, path)
    try:
        return importlib.import_module(source.module)
    except Exception as error:  # what a stranger's module may raise
        raise Absent(f"{source.module} cannot be imported: {first_line(error)}") from error


def origins(root: Path | None) -> dict[str, str]:
    """Repository and commit of every folder of sources, as its file ORIGIN says."""
    tops = dict.fromkeys(folder.split("/")[0] for source in SOURCES.values() for folder in source.folders)
    files = {top: root / top / "ORIGIN" for top in tops} if root is not None else {}
    return {top: " ".join(file.read_text(encoding="utf-8").split()) for top, file in files.items() if file.is_file()}


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
