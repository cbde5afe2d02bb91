"""Packages, their data, and the optional libraries in C; everything else is in pyproject.toml."""

import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def library(folder: str, *headers: str, contract: str = "off") -> Extension:
    """folder/native.c with its headers: no Python module, but a plain library that native.py opens.

    Without a C compiler the package goes without it. contract: whether the compiler may fuse multiply and add.
    """
    sources = [f"{folder}/{name}" for name in ("native.c", *headers)]
    # native.py compares this with the sources it finds, so that an old library is not called with new arguments.
    checksum = zlib.crc32(b"".join((ROOT / source).read_bytes() for source in sources))
    return Extension(
        f"{folder.replace('/', '.')}._native",
        sources[:1],
        depends=sources,
        define_macros=[("FFTP_SOURCES", f"INT64_C({checksum})")],
        # Vectors and their elements share memory.
        extra_compile_args=[
            "-std=gnu11",
            "-O3",
            f"-ffp-contract={contract}",
            "-fno-strict-aliasing",
            "-pthread",
            "-Wno-psabi",
        ],
        extra_link_args=["-pthread"],
        optional=True,
    )


setup(
    packages=find_packages(include=["fftp", "fftp.*", "kernels", "kernels.*", "train", "train.*"]),
    package_data={"train": ["recipes/*.toml", "recipes/*/*.toml"], "fftp.page": ["style.css", "script.js"]},
    ext_modules=[
        library("kernels/attention", "native_matrix.h", "../matrix.h", "../tiles.h", "../native.h"),
        library("kernels/fbank", "native_lanes.h", "../philox.h", "../native.h"),
        library("kernels/gelu", "native_lanes.h", "../lanes.h", "../native.h"),
        library("kernels/linear", "../matrix.h", "../tiles.h", "../native.h"),
        library("kernels/norm", "native_lanes.h", "../lanes.h", "../native.h"),
        library("kernels/spec_mask", "../philox.h", "../native.h"),
        library("kernels/waveform", "native_lanes.h", "../native.h"),
        library("kernels/selective_scan", "native_lanes.h", "../lanes.h", "../native.h", contract="fast"),
    ],
)
