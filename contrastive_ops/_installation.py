"""Where the package's files lie: its compiled extensions, and which of several installations has them.

An extension that calls PyTorch's C++ library has the version of torch in its name that it was built against
(setup.py): PyTorch promises that it fits this version's releases, and no other's. A wheel has those for
several versions.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

PACKAGE = __package__ or "contrastive_ops"
INSTALL = "pip install --no-build-isolation"  # and where from


def extensions(folder: Path) -> set[str]:
    """The names of the extensions in a folder that this Python can import."""
    return {
        file.name.removesuffix(suffix)
        for suffix in EXTENSION_SUFFIXES
        for file in folder.glob(f"_*{suffix}")
        if "." not in file.name.removesuffix(suffix)
    }


def torch_minor() -> str:
    """The version of torch as it stands in extensions' names: "2_14"."""
    return "_".join(torch.__version__.split(".")[:2])


def load_extension(stem: str) -> ModuleType:
    """The extension of that name which was built against this version of torch.

    Raises:
        ImportError: there is none, or it cannot be loaded; the message says what to do.
    """
    package = sys.modules[PACKAGE]
    name = f"{stem}_torch_{torch_minor()}"
    built = {each for folder in package.__path__ for each in extensions(Path(folder))}
    matches = (re.fullmatch(rf"{stem}_torch_(\d+)_(\d+)", each) for each in built)
    others = sorted((int(match[1]), int(match[2])) for match in matches if match)
    versions = ", ".join(f"{major}.{minor}" for major, minor in others)
    again = (
        f"install contrastive_ops again, compiled here: {INSTALL} --force-reinstall --no-deps --no-binary "
        "contrastive-ops contrastive-ops (the last may be its source, after --editable where it "
        "was installed so)"
    )
    if name in built:
        try:
            return importlib.import_module(f"{PACKAGE}.{name}")
        except ImportError as error:
            raise ImportError(f"the C++ extension {name} cannot be loaded ({error}); {again}") from error
    if others:
        raise ImportError(
            f"the C++ extension {stem} was built for torch {versions}, and this is torch "
            f"{torch.__version__}; {again}"
        )
    raise ImportError(f"contrastive_ops was installed without its C++ extension {stem}; {again}")


def installed_instead(here: list[str]) -> list[str]:
    """Where the submodules of the package come from that is imported from the folder `here`: from there.

    The exception is a source tree without extensions, which lies in the way of every program that is started
    in its folder. Its submodules come from the package that is installed elsewhere and, where none is, lack
    the compiled kernels. A warning says which of the two it is, and what to do.
    """
    folder = Path(here[0]).resolve()
    tree = folder.parent
    built = extensions(folder)
    is_whole = "_store" in built and any(name.endswith(f"_torch_{torch_minor()}") for name in built)
    if is_whole or not (tree / "csrc").is_dir() or _is_installed_editable(tree):
        return here
    installed = _installed_elsewhere(tree)
    about = f"{folder} is a source tree without extensions that were compiled for this Python and torch"
    editable = f"To work on it, install it: {INSTALL} --editable {shlex.quote(str(tree))}"
    if installed:
        other, own = _version(installed), _version(folder)
        which = f", version {other} where this is {own}," if other != own else ""
        warnings.warn(
            f"{about}; the package installed in {installed}{which} is used. {editable}", stacklevel=3
        )
        return [str(installed)]
    warnings.warn(
        f"{about}, and contrastive_ops is not installed elsewhere: the slow reference will serve, and there "
        f"is no instance classification. {editable}",
        stacklevel=3,
    )
    return here


def _is_installed_editable(tree: Path) -> bool:
    """Whether the environment's contrastive_ops is this tree, which then lacks extensions by choice."""
    texts = (each.read_text("direct_url.json") for each in distributions(name="contrastive-ops"))
    urls = (json.loads(text) for text in texts if text)
    return any(
        url.get("dir_info", {}).get("editable")
        and Path(url2pathname(urlparse(url["url"]).path)).resolve() == tree
        for url in urls
    )


def _version(folder: Path) -> str:
    (version,) = re.findall(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(), re.MULTILINE)
    return str(version)


def _installed_elsewhere(tree: Path) -> Path | None:
    """The folder of the package that would be imported if the tree were not in the way."""
    paths = [path for path in sys.path if Path(path).resolve() != tree]
    for finder in sys.meta_path:  # that of paths and, for other trees that are installed editable, theirs
        spec = finder.find_spec(PACKAGE, paths)
        if spec is None or spec.origin is None:  # a folder of that name, which is no package
            continue
        folder = Path(spec.origin).parent
        if folder.resolve().parent != tree:
            return folder
    return None
