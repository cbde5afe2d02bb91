"""Weights of one model for another of the same make: another patch grid, another length, other classes."""

from typing import Literal

from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import AuM, AuMConfig
from fftp.patching import PatchGrid


def fit(
    source: AST | AuM,
    target: AST | AuM,
    keep_head: bool,
    resize: Literal["pinv", "bilinear"] = "pinv",
) -> list[str]:
    """Fill target, freshly initialised, with source's weights; returns `changes`.

    Positions are resized bilinearly with antialias and patch kernels by `resize` where the grids differ. Without keep_head
    target's own head stays as it was drawn. The models agree in all but grid and classes; source is used up.
    """
    if target.config.grid != source.config.grid:
        source.embed = source.embed.resized(target.config.grid, resize)
    if not keep_head:
        source.head = target.head
    target.load_state_dict(source.state_dict())
    return changes(source.config, target.config, keep_head)


def changes(old: ASTConfig | AuMConfig, new: ASTConfig | AuMConfig, keep_head: bool) -> list[str]:
    """What `fit` changes between models of these configurations, in words."""
    done = []
    if new.grid != old.grid:
        done.append(f"embedding resized from {described(old.grid)} to {described(new.grid)}")
    if not keep_head:
        done.append(f"a new head of {new.classes} classes in place of {old.classes}")
    return done


def cost(old: PatchGrid, new: PatchGrid) -> str:
    """A plain sentence on what resized patch kernels lose, or "" where patches stay as they are."""
    if (old.pt, old.pf) == (new.pt, new.pf):
        return ""
    rank, whole = min(old.pt, new.pt) * min(old.pf, new.pf), old.pt * old.pf
    return (
        f"patch kernels made for {old.pt} frames x {old.pf} bins are stretched to {new.pt} x {new.pf} "
        f"({rank} of their {whole} dimensions stay) and positions in {old.n_f} bands go to {new.n_f}: "
        "most of what they knew is lost, so this is a start for fine-tuning and no model that answers yet."
    )


def described(grid: PatchGrid) -> str:
    return f"{grid.N} patches of {grid.pt} frames x {grid.pf} bins"
