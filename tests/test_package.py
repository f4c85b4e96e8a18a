"""The sdist is complete: a wheel built from nothing but it holds everything that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def build(source, into, kind):
    """Call the build backend in a process of its own, quietly, as pip does."""
    code = f"from setuptools.build_meta import build_{kind} as build; print(build({str(into)!r}))"
    environment = {**os.environ, "CFLAGS": "-O0"}  # what is compiled here is looked at, never run
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, built from a copy of the files under version control, so that the tree itself stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this folder is not a git clone: there is no list of the files that belong to it")
    for name in (n for n in listed.stdout.decode().split("\0") if (PROJECT / n).is_file()):
        target = folder / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((PROJECT / name).read_bytes())
    return build(folder / "clone", folder, "sdist")


@pytest.fixture(scope="module")
def wheel(sdist):
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # 3.11.4 and later have one
        archive.extractall(sdist.parent)
    return build(sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent, "wheel")


def test_the_sdist_holds_the_project(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(PROJECT))
        for folder in ("pyx", "src", "tests", "benches", "docs")
        for path in (PROJECT / folder).rglob("*")
        if path.suffix in {".pyx", ".pxd", ".h", ".py", ".md"}
    }
    wanted |= {"Makefile", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "setup.py"}
    assert not wanted - names


def test_a_wheel_from_the_sdist_holds_what_runs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = [path.stem for path in (PROJECT / "pyx").glob("_*.pyx")]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wanted = {f"whisper_fast/{kernel}{ending}" for kernel in kernels for ending in (suffix, ".pyi")}
    wanted |= {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "whisper_fast").rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    assert not wanted - names
    strange = {n for n in names if not n.startswith(("whisper_fast/", "whisper_fast-"))}
    assert not strange


def test_the_wheel_carries_the_notices(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("NOTICE") and ".dist-info" in name for name in names)
