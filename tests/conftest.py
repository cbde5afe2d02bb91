"""What every test gets: the device, dispatch as it was found, a cache of its own; long forms only when asked for."""

import os

# Read when OpenMP is loaded. Long processes run beside the tests (beside.py): a thread that waits for one without a core would
# spin on its own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import beside
import pytest
import torch

from kernels import dispatch, packages


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the GPU cases on the CUDA device; without one, refuse")
    parser.addoption("--slow", action="store_true", help="run the long forms too (make test-all)")


def pytest_configure(config):
    if config.getoption("--gpu") and not torch.cuda.is_available():
        pytest.exit("--gpu: torch finds no CUDA device here; run without --gpu, or where there is one.", returncode=2)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    long = [] if config.getoption("--slow") else [item for item in items if item.get_closest_marker("slow")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


def pytest_collection_finish(session):
    if not session.config.getoption("collectonly"):
        beside.begin(session.config, dict.fromkeys(item.path.stem for item in session.items))


def pytest_unconfigure(config):
    if beside.BESIDE in config.stash:
        config.stash[beside.BESIDE].stop()


@pytest.fixture(scope="session")
def device(request) -> str:
    """Where kernels run: "cuda" under --gpu, else "cpu"."""
    return "cuda" if request.config.getoption("--gpu") else "cpu"


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """Packs and downloads go to a temporary folder, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFTP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def plain_dispatch():
    """Each test starts and ends with the reference backends, and with nothing remembered."""
    given = os.environ.pop("FFTP_BACKEND", None)
    dispatch.use_fused(False)
    dispatch.forget()
    packages.refusal.cache_clear()
    yield
    dispatch.use_fused(False)
    dispatch.forget()
    os.environ.pop("FFTP_BACKEND", None)
    if given is not None:
        os.environ["FFTP_BACKEND"] = given


@pytest.fixture
def poison(monkeypatch):
    """Tensors that start with whatever is in memory start as NaN."""
    monkeypatch.setattr(torch, "empty", lambda size, **how: torch.full(size, float("nan"), **how))
