"""A package that is local on the manager, and installed on a host in an older version, with data and compiled parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

_CODE = """
import importlib.resources
import inspect
import pathlib
import pkgutil

from . import inner

VALUE = "{value}"


class Thing:
    word = "{value}"


def value():
    return VALUE, inner.VALUE


def shown():
    return inspect.getsource(Thing)


def by_pkgutil():
    return pkgutil.get_data("edpk", "d.txt").decode()


def by_resources():
    return (importlib.resources.files("edpk") / "d.txt").read_text()


def by_resources_of_a_folder():
    return importlib.resources.files("edpk.more").joinpath("e.txt").read_text()


def by_file():
    return (pathlib.Path(__file__).parent / "d.txt").read_text()


def by_file_of_a_submodule():
    return inner.read()


def compiled():
    from edpk import _c

    return _c.__name__


def compiled_by_name():
    import edpk._c

    return edpk._c.__name__
"""
_INNER = """
import pathlib
{extra}
VALUE = "{value}"


def read():
    return (pathlib.Path(__file__).parent / "d.txt").read_text()
"""
_C = """
#include <Python.h>
static struct PyModuleDef D = {PyModuleDef_HEAD_INIT, "_c", 0, -1, 0};
PyMODINIT_FUNC PyInit__c(void) { return PyModule_Create(&D); }
"""
DATA = ("by_pkgutil", "by_resources", "by_file", "by_resources_of_a_folder", "by_file_of_a_submodule")
COMPILED = ("compiled", "compiled_by_name")


def write_package(folder: Path, value: str, extra: str = "") -> Path:
    """Write the code of the package; `extra` is code of a submodule."""
    package = folder / "edpk"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(_CODE.format(value=value))
    (package / "inner.py").write_text(_INNER.format(value=value, extra=extra))
    return package


def compile_part(folder: Path) -> Path:
    """Compile the extension module of the package."""
    compiler, include = shutil.which("cc"), sysconfig.get_paths()["include"]
    if compiler is None or not Path(include, "Python.h").is_file():
        pytest.skip("there is no C compiler, or Python has no headers")
    source, made = folder / "_c.c", folder / f"_c{sysconfig.get_config_var('EXT_SUFFIX')}"
    source.write_text(_C)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", made], check=True)
    return made


def install_on(host: Any, folder: Path, distribution: str = "ed-dist") -> str:
    """Have an older version of the package installed on a host, with all its parts; returns the environment's path."""
    host.run(f"{sys.base_prefix}/bin/python3 -m venv --without-pip ~/mine", user=host.user)
    (site,) = Path(host.path("~/mine/lib")).glob("python3*/site-packages")
    package = write_package(folder / "older", "older")
    (package / "d.txt").write_text("data")
    (package / "more").mkdir()
    (package / "more" / "e.txt").write_text("more data")
    shutil.copy(compile_part(folder), package)
    shutil.copytree(package, site / "edpk")
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    # What engines need is found where the manager has it.
    (site / "engines.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    return "~/mine"


def checkout(folder: Path, extra: str = "", distribution: str = "ed-dist") -> Path:
    """Write a checkout of the project with newer code, and nothing beside it."""
    (folder / "checkout").mkdir()
    (folder / "checkout" / "pyproject.toml").write_text(f'[project]\nname = "{distribution}"\nversion = "2.0"\n')
    write_package(folder / "checkout", "newer", extra)
    return folder / "checkout"
