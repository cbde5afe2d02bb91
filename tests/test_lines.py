"""What is kept of a run: which of its settings are its own."""

from train import settings
from train.lines import changed


def test_settings_that_are_the_runs_own():
    given = settings.to_dict(settings.from_flags(["--recipe", "speechcommands/laptop_ast_fftp"])[0])
    assert changed(given) == {}
    assert changed(given | {"lr": 0.5, "seed": 7, "out": "x", "epochs": 9, "workers": 3}) == {"lr": 0.5}
    assert changed(given | {"keep_tokens": 22}) == {"keep_tokens": 22}
    older = {name: value for name, value in given.items() if name != "keep_tokens"}
    assert changed(older) == {}  # there was no such flag yet
