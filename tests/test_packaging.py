"""What a clone, a wheel and an sdist hold."""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sparsify

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "kernels")

in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None,
                                   reason="asks git which files belong to the tree")


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def files_of_the_tree() -> set[str]:
    """Committed and new files that an installed sparsify must have, by their place under site-packages."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "sparsify", *ROOMS)
    files = {f"sparsify/{name}" if name.split("/")[0] in ROOMS else name for name in listed}
    return {name for name in files if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel made from it, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
                   check=True, capture_output=True)
    return folder


@in_a_checkout
def test_the_wheel_holds_the_files_of_the_tree(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_tree()


@in_a_checkout
def test_the_sdist_holds_the_files_of_the_tree(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert names >= files_of_the_tree() | {"LICENSE", "README.md", "pyproject.toml"}


@in_a_checkout
@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_committed_links(room):
    link = ROOT / "sparsify" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    [entry] = git("ls-files", "--stage", f"sparsify/{room}")
    assert entry.startswith("120000 ")


def test_rooms_have_one_name(monkeypatch):
    """`passes` and `kernels` lie in the root of a clone; under those names their modules would exist twice."""
    monkeypatch.syspath_prepend(str(ROOT))
    for room in ROOMS:
        sys.modules.pop(room, None)
        try:
            module = importlib.import_module(room)
        except ImportError:
            continue
        assert not [name for name in vars(module) if not name.startswith("__")], f"{room} came up under its short name"
        with pytest.raises(ImportError):
            importlib.import_module(f"{room}.blocks" if room == "kernels" else f"{room}.find")


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert version("sparsify-attention") == sparsify.__version__


def test_dynamo_finds_the_backend():
    [entry] = entry_points(group="torch_dynamo_backends", name="sparsify")
    from sparsify.backend import backend

    assert entry.load() is backend


def test_what_ships_is_licensed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_public_face_is_complete():
    for name in sparsify.__all__:
        assert getattr(sparsify, name) is not None
        assert name in dir(sparsify)
    with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
        sparsify.sparsity  # noqa: B018
