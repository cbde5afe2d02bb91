"""Whether a CUDA function of an optional package can be called here, and if not, why."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class PackageFunction:
    """A public function of a package, and how it is called here.

    package: its name for pip. path: "module:function". extension: the compiled module without which the function cannot
    run. cure: what to do when that is missing. keywords: the arguments that are passed, all of them by name.
    """

    package: str
    path: str
    extension: str
    cure: str
    keywords: tuple[str, ...]

    def load(self) -> Callable:
        module, function = self.path.split(":")
        return getattr(importlib.import_module(module), function)


SELECTIVE_SCAN = PackageFunction(
    "mamba-ssm",
    "mamba_ssm.ops.selective_scan_interface:selective_scan_fn",
    "selective_scan_cuda",
    "releases after 2.3.2 build it only where MAMBA_KEEP_CUDA_BUILD=TRUE is set",
    ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
)
CAUSAL_CONV = PackageFunction(
    "causal-conv1d",
    "causal_conv1d:causal_conv1d_fn",
    "causal_conv1d_cuda",
    "build it with nvcc and without CAUSAL_CONV1D_SKIP_CUDA_BUILD",
    ("x", "weight", "bias", "activation"),
)


@cache
def refusal(wanted: PackageFunction) -> str | None:
    """Why the function cannot be called, or None. The first call imports the package, if it is there with its extension."""
    module, name = wanted.path.split(":")
    if not _present(module.partition(".")[0]):
        return f"the {wanted.package} package is not installed"
    if not _present(wanted.extension):
        return f"{wanted.package} is installed without its CUDA extension {wanted.extension}: {wanted.cure}"
    try:
        function = wanted.load()
    # An extension that was built for another torch fails in many ways; the reason is quoted, not lost.
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        return f"importing {name} from {module} fails: {type(error).__name__}: {said}"
    try:
        inspect.signature(function).bind(**dict.fromkeys(wanted.keywords))
    except TypeError as error:
        return f"this release of {wanted.package} has another {name}: {error}"
    return None


def _present(module: str) -> bool:
    # find_spec raises for a module that was put into sys.modules by hand.
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None
