"""Which backend runs, what is said when one cannot, and the ranges that cost nothing when nobody profiles."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch, ranges
from kernels.dispatch import Backend, BackendError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made_up(monkeypatch):
    """An operation "twice" with three backends: one for the GPU alone, one for float32 alone, the reference."""
    monkeypatch.setattr(sys.modules[__name__], "calls", [], raising=False)
    backends = (
        Backend("gpu", f"{__name__}:gpu", lambda device, dtype: None if device == "cuda" else "it needs a GPU"),
        Backend("quick", f"{__name__}:quick", lambda device, dtype: None if dtype == "float32" else "float32 only"),
        Backend("reference", f"{__name__}:plain"),
    )
    monkeypatch.setitem(dispatch.TABLE, "twice", backends)
    dispatch._overrides.cache_clear()
    yield
    dispatch._overrides.cache_clear()


def gpu(x):
    raise AssertionError("never on a CPU")


def quick(x):
    return x + x


def plain(x):
    return 2 * x


@pytest.mark.parametrize(
    ("fused", "dtype", "function"),
    [
        (False, torch.float32, plain),
        (True, torch.float32, quick),
        (True, torch.float64, plain),
        (True, torch.bfloat16, plain),
    ],
)
def test_the_first_that_applies(made_up, fused, dtype, function):
    dispatch.use_fused(fused)
    assert dispatch.fused() is fused
    assert dispatch.choose("twice", torch.zeros(1, dtype=dtype)) is function
    assert dispatch.in_use() == {"twice": "quick" if function is quick else "reference"}


def test_autocasts_type_is_the_one_that_counts(made_up):
    dispatch.use_fused(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.choose("twice", torch.zeros(1)) is plain


@pytest.mark.parametrize("fused", [False, True])
def test_the_variable_overrides_both_ways(made_up, monkeypatch, fused):
    dispatch.use_fused(fused)
    monkeypatch.setenv("FFTP_BACKEND", "twice=quick, patch_embed=reference")
    dispatch.check_overrides()
    assert dispatch.choose("twice", torch.zeros(1)) is quick
    monkeypatch.setenv("FFTP_BACKEND", "twice=reference")
    assert dispatch.choose("twice", torch.zeros(1)) is plain
    assert dispatch.in_use() == {"twice": "reference"}
    monkeypatch.setenv("FFTP_BACKEND", "")
    assert dispatch.choose("twice", torch.zeros(1)) is (quick if fused else plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("twice=slow", "twice has no backend 'slow'; there are gpu, quick, reference."),
        ("thrice=quick", "'thrice=quick' names none of"),
        ("twice", "'twice' names none of"),
        ("fbank=reference,twice=", "twice has no backend ''"),
    ],
)
def test_a_wrong_override_is_refused_before_any_work(made_up, monkeypatch, text, message):
    monkeypatch.setenv("FFTP_BACKEND", text)
    with pytest.raises(BackendError) as raised:
        dispatch.check_overrides()
    assert message in str(raised.value)
    with pytest.raises(BackendError):
        dispatch.choose("fbank", torch.zeros(1))


def test_a_backend_asked_for_never_falls_back(made_up, monkeypatch):
    dispatch.use_fused(True)
    monkeypatch.setenv("FFTP_BACKEND", "twice=gpu")
    with pytest.raises(BackendError, match="FFTP_BACKEND asks for twice=gpu, which cannot run: it needs a GPU"):
        dispatch.choose("twice", torch.zeros(1))
    monkeypatch.setenv("FFTP_BACKEND", "twice=quick")
    with pytest.raises(BackendError, match="cannot run: float32 only"):
        dispatch.choose("twice", torch.zeros(1, dtype=torch.float64))
    assert dispatch.in_use() == {}


def test_real_backends_refuse_with_a_reason(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "selective_scan=blocked")
    with pytest.raises(BackendError, match="it computes in float32; the tensors are float64"):
        dispatch.select("selective_scan", "cpu", "float64")
    with pytest.raises(BackendError, match="the tensors are on cuda"):
        dispatch.select("selective_scan", "cuda", "float32")


def test_operations_in_c_refuse_with_a_reason(monkeypatch):
    """No library: why, and how to get it; another device or type: which."""
    from kernels.fbank import native

    monkeypatch.setattr(type(native.LIBRARY), "refuses", lambda library: "it is not built: ...")
    for operation in ("waveforms", "fbank", "normalise"):
        refuses = next(b for b in dispatch.TABLE[operation] if b.name == "native").refuses
        assert refuses("cuda", "float32") == "it is C for the CPU; the tensors are on cuda"
        assert refuses("cpu", "float32") == "it is not built: ..."
        dispatch.use_fused(True)
        assert dispatch.select(operation, "cpu", "float32").name == "reference"
        if operation != "waveforms":  # which takes int16 alone
            assert refuses("cpu", "float64") == "it computes in float32; the tensors are float64"
            assert refuses("cpu", "bfloat16") == "it computes in float32; the tensors are bfloat16"


def test_a_backend_by_name_only_is_passed_over_until_asked_for(made_up, monkeypatch):
    new = Backend("new", f"{__name__}:quick", by_name_only={"cpu": "for tests"})
    monkeypatch.setitem(dispatch.TABLE, "twice", (new, *dispatch.TABLE["twice"]))
    dispatch._overrides.cache_clear()
    dispatch.use_fused(True)
    assert dispatch.select("twice", "cpu", "float32").name == "quick"
    assert dispatch.select("twice", "cuda", "float32").name == "new"
    assert ("twice", "new", "for tests") in dispatch.table("cpu", "float32")
    assert ("twice", "quick", "runs with --fused") in dispatch.table("cpu", "float32")
    monkeypatch.setenv("FFTP_BACKEND", "twice=new")
    assert dispatch.select("twice", "cpu", "float32").name == "new"


def test_triton_is_first_on_a_gpu_and_refuses_the_cpu(monkeypatch):
    """In the interpreter it runs on a CPU, for tests, when it is asked for by name."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operations = [o for o, backends in dispatch.TABLE.items() if backends[0].name == "triton"]
    assert {
        "waveforms",
        "fbank",
        "normalise",
        "spec_mask",
        "spec_augment",
        "apply_spec_mask",
        "apply_spec_augment",
        "paint",
        "patch_embed",
        "selective_scan",
        "causal_conv",
    } <= set(operations)
    for operation in operations:
        dispatch.use_fused(True)
        assert dispatch.select(operation, "cuda", "bfloat16").name == "triton"
        assert dispatch.select(operation, "cpu", "float32").name != "triton"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert dispatch.select(operation, "cpu", "float32").name != "triton"
        states = {name: state for o, name, state in dispatch.table("cpu", "float32") if o == operation}
        assert states["triton"] == "Triton's interpreter is for tests: ask for it by FFTP_BACKEND"
        monkeypatch.setenv("FFTP_BACKEND", f"{operation}=triton")
        assert dispatch.select(operation, "cpu", "float32").name == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match="it runs on an NVIDIA GPU; the tensors are on cpu"):
            dispatch.select(operation, "cpu", "float32")
        monkeypatch.delenv("FFTP_BACKEND")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.select("spec_mask", "cuda", "int64").name == "reference"
    assert dispatch._triton("cuda", "float32") == "the triton package is not installed"


def test_in_use_remembers_what_ran_in_the_tables_order():
    log_mel = torch.randn(1, 6, 3)
    kernels.paint(log_mel, torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1))
    kernels.fbank(torch.zeros(1, 400))
    dispatch.use_fused(True)
    kernels.patch_embed(log_mel, torch.randn(2, 1, 3, 3), torch.zeros(2), (1, 1), None, torch.zeros(0, 2), 0)
    assert list(dispatch.in_use().items()) == [(name, "reference") for name in ("fbank", "paint", "patch_embed")]
    dispatch.forget()
    assert dispatch.in_use() == {}


def test_table_says_what_runs_and_why_not(made_up, monkeypatch):
    monkeypatch.setitem(dispatch.TABLE, "once", (Backend("reference", f"{__name__}:plain"),))
    rows = {(operation, name): state for operation, name, state in dispatch.table("cpu", "float32")}
    assert rows["twice", "gpu"] == "cannot run: it needs a GPU"
    assert rows["twice", "quick"] == "runs with --fused"
    assert rows["twice", "reference"] == "runs without --fused"
    assert rows["once", "reference"] == "runs"
    rows = {(operation, name): state for operation, name, state in dispatch.table("cuda", "float32")}
    assert rows["twice", "gpu"] == "runs with --fused"
    assert rows["twice", "quick"] == "gpu is preferred"
    rows = {(operation, name): state for operation, name, state in dispatch.table("cpu", "bfloat16")}
    assert rows["twice", "quick"] == "cannot run: float32 only"
    assert rows["twice", "reference"] == "runs with --fused"


def test_every_backend_of_the_table_can_be_loaded_and_the_last_refuses_nothing():
    for operation, backends in dispatch.TABLE.items():
        assert backends[-1].name == "reference", operation
        for device in ("cpu", "cuda"):
            for dtype in ("float32", "float64", "bfloat16", "float16", "int64"):
                assert backends[-1].refuses(device, dtype) is None
        for backend in backends:
            if not backend.refuses("cpu", "float32"):
                assert callable(backend.load())


def run(code: str, **environment) -> subprocess.CompletedProcess:
    """A process of its own, without the variables that profilers set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NVTX_", "NSYS_", "FFTP_"))}
    clean |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=120)


_RANGES = """
import sys, types
sys.modules["nvtx"] = nvtx = types.ModuleType("nvtx")
spans = []
class annotate:
    def __init__(self, name, domain): self.name = name, domain
    def __enter__(self): spans.append(("in", *self.name))
    def __exit__(self, *exception): spans.append(("out", *self.name))
nvtx.annotate = annotate
from kernels import ranges
with ranges.range("embed"):
    with ranges.range("mask"):
        pass
print(spans)
"""


@pytest.mark.parametrize("variable", ["FFTP_NVTX", "NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"])
def test_ranges_are_marked_when_somebody_profiles(variable):
    spans = [("in", "embed", "fftp"), ("in", "mask", "fftp"), ("out", "mask", "fftp"), ("out", "embed", "fftp")]
    done = run(_RANGES, **{variable: "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(spans)


def test_ranges_are_nothing_when_nobody_profiles():
    done = run(_RANGES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    # Not even imported: an entry of None makes an import fail.
    code = (
        "import sys; sys.modules['nvtx'] = None; from kernels import ranges as r; assert r.range('a') is r.range('b')"
    )
    assert run(code).returncode == 0


def test_ranges_reach_the_real_package():
    pytest.importorskip("nvtx", reason="the nvtx package is not installed")
    done = run(
        "import nvtx; from kernels import ranges; print(type(ranges.range('a')) is nvtx.annotate)", FFTP_NVTX="1"
    )
    assert done.stdout.strip() == "True", done.stderr


def test_ranges_without_the_package_are_torchs_own_on_a_gpu():
    """The GPU machine may lack nvtx; a build without CUDA has no ranges of its own, and says what is missing."""
    code = "import sys, torch; sys.modules['nvtx'] = None; torch.version.cuda = {}; from kernels import ranges; {}"
    made = "import torch.cuda.nvtx as n; print(ranges._make is n.range)"
    assert run(code.format("'13.0'", made), FFTP_NVTX="1").stdout.strip() == "True"
    assert "nvtx" in run(code.format("None", "pass"), FFTP_NVTX="1").stderr


def test_a_profiler_of_its_own_makes_ranges_while_it_runs():
    seen = []

    @contextlib.contextmanager
    def noted(name):
        seen.append(name)
        yield

    before = ranges.range("embed")
    assert not ranges.watched()
    with ranges.made_by(noted):
        assert ranges.watched()
        with ranges.range("embed"):
            pass
    assert seen == ["embed"]
    assert ranges.range("embed") is before
    assert not ranges.watched()


def test_gpu_without_a_device_ends_with_a_sentence():
    """pytest --gpu where torch sees no device: exit code 2, and why."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--gpu", "-q", str(Path(__file__).parent / "test_philox.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert done.returncode == 2, done.stdout
    assert "--gpu: torch finds no CUDA device here" in done.stdout + done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float64,) * 2, (torch.int16,) * 2],
)
def test_autocast_leaves_float64_and_integers_alone(dtype, computed):
    """As PyTorch's own product does."""
    tensor = torch.ones(2, 2, dtype=dtype)
    assert dispatch.computed_in(tensor) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.computed_in(tensor) == computed
        if dtype.is_floating_point:
            assert torch.mm(tensor, tensor).dtype == computed
    dispatch.use_fused(True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weight = torch.eye(32, dtype=torch.float64) / 3
        assert torch.equal(kernels.linear(weight, weight), weight @ weight.T)
        assert dispatch.in_use()["linear"] == "reference"
