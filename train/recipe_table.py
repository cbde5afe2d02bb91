"""docs/RECIPES.md: what every recipe's model costs and how it is trained, computed, beside the paper's figures."""

import torch

from fftp import checkpoint
from train import run as train_run
from train import settings, tables

CLASSES = {"audioset": 527, "speechcommands": 35, "folder": 50, "synth": 10}
HEAD = (
    "recipe", "model", "frames", "patch, frames x bins", "stride", "patches", "parameters, M",
    "GMAC without attention's products", "with them", "training", "paper: patches", "paper: \"GFLOPs\"", "paper: score",
)  # fmt: skip
INTRODUCTION = """# Recipes

Every recipe under `train/recipes/`, its model built and counted for AudioSet's 527 classes, Speech Commands' 35, and 50
(folder) or 10 (synth). GMAC are thousand millions of multiply-accumulates of one clip in one forward pass. The paper's
scores are mAP on AudioSet-18k and accuracy on Speech Commands V2, as printed; ours are in README, where there are any.
`python -m train.reproduce recipes` prints this page.
"""


def markdown() -> str:
    """The page."""
    rows = [HEAD, ["---"] * len(HEAD), *(_row(name) for name in settings.recipe_names())]
    notes = "\n".join(f"- {tables.FOOTNOTES[note]}" for note in ("gmacs", "4.15", "frames", "published"))
    return f"{INTRODUCTION}\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + f"\n\n{notes}\n"


def _row(name: str) -> list[str]:
    chosen = settings.Settings(**settings.read_recipe(name))
    config = train_run.model_of(chosen, CLASSES[chosen.data])
    with torch.device("meta"):
        model = checkpoint.MODELS[chosen.model][0](config)
    parameters, macs, grid = sum(p.numel() for p in model.parameters()), config.macs(), config.grid
    rate = (
        f"{chosen.optimiser} {chosen.lr:g}, {chosen.schedule}, {chosen.epochs} epochs of batches of {chosen.batch_size}"
    )
    return [
        name,
        f"{ {'ast': 'AST', 'aum': 'AuM'}[chosen.model] }-{chosen.size}, {config.depth} layers",
        str(grid.T),
        f"{grid.pt} x {grid.pf}",
        f"{grid.st} x {grid.sf}",
        str(grid.N),
        f"{parameters / 1e6:.2f}",
        f"{macs.paper / 1e9:.2f}",
        f"{macs.all / 1e9:.2f}",
        rate,
        *_papers(name),
    ]


def _papers(name: str) -> list[str]:
    """The paper's patches, "GFLOPs" and score for a recipe, where it has them."""
    data, recipe = name.split("/")
    first = next((system for system in tables.TABLE1 if system.recipe == recipe), None)
    second = next((system for system in tables.TABLE2 if system.recipe == recipe), None)
    if data == "speechcommands":
        return ["", "", f"{first.paper['accuracy']:.2f}" if first else ""]
    if data != "audioset":
        return ["", "", ""]
    score = (first or second).paper["map"] if first or second else None
    cost = [f"{second.paper['patches']}", f"{second.paper['gmacs']:.2f}"] if second else ["", ""]
    return [*cost, f"{score:.2f}" if score else ""]
