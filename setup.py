"""Packages, their data and the CPU's native kernels; everything else is in pyproject.toml.

The kernels are optional: without a C compiler everything works, by PyTorch's own operations. In a clone,
`python setup.py build_ext --inplace` puts them where they are looked for.
"""

from setuptools import Extension, find_packages, setup

FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast"]
scan = Extension(
    "kernels.selective_scan._native",
    ["kernels/selective_scan/native.c"],
    depends=["kernels/selective_scan/native_body.h"],
    extra_compile_args=FLAGS,
    optional=True,
)

setup(
    packages=find_packages(include=["fftp", "fftp.*", "kernels", "kernels.*", "train", "train.*"]),
    package_data={"train": ["recipes/*.toml", "recipes/*/*.toml"]},
    ext_modules=[scan],
)
