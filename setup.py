"""Builds the compiled kernels: one extension for each pyx/*.pyx, with the C files of src/ that it wraps."""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

# An extension's C sources are src/<its name without the underscore>*.c, and those that it shares; all headers and
# externs are dependencies, so that a change rebuilds what it touches and the sdist holds every file.
PARTS = {"_recall": ("recall", "lexical", "vector")}
HEADERS = sorted(glob("src/*.h") + glob("pyx/*.pxd"))


def extension(pyx: str) -> Extension:
    name = pyx.removeprefix("pyx/").removesuffix(".pyx")
    sources = sorted(file for part in PARTS.get(name, (name.removeprefix("_"),)) for file in glob(f"src/{part}*.c"))
    return Extension(
        f"whisper_fast.{name}",
        [pyx, *sources],
        include_dirs=["src"],
        depends=[*HEADERS, *sources],
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"],
    )


setup(
    packages=find_packages(include=["whisper_fast", "whisper_fast.*"]),  # never src/, which holds C
    package_data={
        "whisper_fast": ["py.typed", "*.pyi"],
        "whisper_fast.models": ["data/*"],
        "whisper_fast.door": ["static/*"],
    },
    ext_modules=cythonize(
        [extension(pyx) for pyx in sorted(glob("pyx/*.pyx"))],
        include_path=["pyx"],
        compiler_directives={
            "language_level": 3,
            "binding": True,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "auto_pickle": False,
            "autotestdict": False,
            "embedsignature": False,
        },
    ),
)
