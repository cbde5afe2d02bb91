"""Fixtures of tests of operations in C."""

import pytest

import kernels.native as shared


def multiplied(native, library=None):
    """A fixture: C by vectors, then by tiles, as far as this processor has them. native: the operation's module; library: its
    own where that has none."""

    @pytest.fixture(params=[shared.SETS.index("AVX-512"), shared.AMX], ids=["vectors", "tiles"])
    def in_c(request, monkeypatch):
        if reason := native.refuses():
            pytest.skip(reason)
        if (library or native.LIBRARY).widest() < request.param:
            pytest.skip(f"this processor has no {shared.SETS[request.param]}")
        monkeypatch.setattr(shared, "use_set", request.param)
        return request.param

    return in_c
