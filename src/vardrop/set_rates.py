"""Set the rates of the dropouts that a model already has, by their roles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from vardrop import config_fields, roles
from vardrop.dropouts_before import is_off
from vardrop.given import check_module
from vardrop.layers.dropblock import DropBlock1d, DropBlock2d, DropBlock3d
from vardrop.layers.droppath import DropPath
from vardrop.presets import PRESETS, RateOfLayer
from vardrop.rates import Rated
from vardrop.roles import Site
from vardrop.schedules import checked_rate


@dataclass
class RatesReport:
    """What :func:`set_rates_` did.

    Attributes:
        set: name -> its rate before and now, for modules, numbers and fields of configs (``config.attn_pdrop``).
        missing: role that was asked for -> why nothing was set.
        skipped: name -> reason, in a sentence, for what has a role that was asked for.
        not_judged: names of dropouts, and of fields of configs, whose role is not known; they keep their rates.
        optimizer: what belongs to the preset and is yours to give to an optimiser.
    """

    set: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    not_judged: list[str] = field(default_factory=list)
    optimizer: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"set: {len(self.set)}"]
        lines += [f"  {name}: {old:g} -> {new:g}" for name, (old, new) in self.set.items()]
        lines += [f"not found: {role}: {reason}" for role, reason in self.missing.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            lines += [f"left alone: {', '.join(name for name, why in self.skipped.items() if why == reason)}: {reason}"]
        lines += [f"not judged: {name}" for name in self.not_judged]
        return "\n".join(lines + [f"yours to set: {name}={value:g}" for name, value in self.optimizer.items()])


def set_rates_(
    model: nn.Module,
    *,
    attention: RateOfLayer | None = None,
    residual: RateOfLayer | None = None,
    embedding: RateOfLayer | None = None,
    hidden: RateOfLayer | None = None,
    head: RateOfLayer | None = None,
    path: RateOfLayer | None = None,
    block: RateOfLayer | None = None,
    preset: str | None = None,
) -> RatesReport:
    """Set the rates of the dropouts that a PyTorch, timm or Hugging Face model has, in place, by role.

    Modules, numbers that a forward hands to a function, and the fields of a Hugging Face config alike. The table
    ``vardrop.roles.TABLE`` says which dropout plays which role; what it does not know keeps its rate and is listed. A
    branch that was built without DropPath (timm puts an ``nn.Identity`` there) gets a :class:`vardrop.layers.DropPath`
    where its rate is to be above 0, and an ``nn.Identity`` called ``drop_block`` behind convolutions a
    :class:`vardrop.layers.DropBlock2d` (1d, 3d) of the paper's block size, 7. The paper has DropBlock in the last two
    stages of a ResNet only, which ``block=lambda index, depth: ...`` can say.

    A rate is a number, or a function ``(index, depth) -> rate`` of the layer, 0 to depth - 1, among those layers that
    have a dropout of this role.

    The presets are in :data:`vardrop.presets.PRESETS`, with their sources. An argument replaces its part of one:

    * ``"bert"``: 0.1 everywhere.
    * ``"gpt-2"``: 0.1 on attention, residual and embedding.
    * ``"deit"``: path from 0 in the first block to 0.1 in the last, no other dropout.
    * ``"large-model"``: 0 everywhere, as is the practice where the data outgrow the model. AdamW with weight decay 0.1
      and gradients clipped to norm 1.0 belong to it, and are yours to set: ``report.optimizer`` has the numbers.

    Args:
        model: any module.
        attention: rate on attention weights.
        residual: rate on the output of a branch, before it is added to the residual stream.
        embedding: rate on embeddings and positions.
        hidden: rate on hidden units, inside of a feed-forward block, between (recurrent) layers.
        head: rate before the classifier.
        path: rate of whole residual branches or layers (DropPath, stochastic depth, LayerDrop).
        block: rate of blocks of a feature map (DropBlock).
        preset: ``"bert"``, ``"gpt-2"``, ``"deit"`` or ``"large-model"``.

    Returns:
        A report: what was set, what was not found, what was left alone and why, what was not judged.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no role is given, a rate is outside [0, 1], the preset is unknown, or the model has nothing of
            what was asked for. The model is then as it was.

    Example:
        >>> import vardrop as vd
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        >>> report = vd.set_rates_(layer, attention=0.1, residual=0.2, path=0.1)
        >>> report.set
        {'self_attn.dropout': (0.0, 0.1), 'dropout1': (0.0, 0.2), 'dropout2': (0.0, 0.2)}
        >>> report.missing
        {'path': 'the model has no dropout of this role'}
    """
    check_module(model, "set_rates_")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"vardrop.set_rates_: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {
        "attention": attention, "residual": residual, "embedding": embedding, "hidden": hidden, "head": head,
        "path": path, "block": block,
    }  # fmt: skip
    named = {role: rate for role, rate in given.items() if rate is not None}
    asked = {**(PRESETS[preset].rates if preset else {}), **named}
    if not asked:
        raise ValueError(
            f"vardrop.set_rates_: a rate must be given for some role ({', '.join(roles.ROLES)}), or a preset, got none"
        )
    for role, rate in asked.items():
        if not callable(rate):
            checked_rate(rate, f"set_rates_({role}=)")

    found = roles.sites(model)
    report = RatesReport(not_judged=[site.name for site in found if site.role is None and site.owner is not None])
    report.not_judged += roles.unknown(model)
    report.optimizer |= PRESETS[preset].optimizer if preset else {}
    plan = list(_plan(found, asked, report))
    # a field without a value follows another one, which is about to change: it is given the rate that it stands for
    present = {site.role for site in found}
    fields = [
        place
        for place in config_fields.places(model)
        if place.governed & set(asked) or (not place.has_value and place.governed <= present)
    ]
    report.not_judged += [place.name for place in config_fields.places(model) if not place.governed]
    for role, rate in asked.items():
        if role not in {site.role for site, _ in plan} and (role in named or callable(rate) or rate > 0):
            mine = [site.name for site in found if site.role == role]
            report.missing[role] = (
                "the model has no dropout of this role"
                if not mine
                else "all that the model has are left alone"
                if any(name in report.skipped for name in mine)
                else "the model has empty places for it only, which is a rate of 0"
            )
    if not plan and not any(place.has_value for place in fields):
        reasons = [f"{name}: {why}" for name, why in report.skipped.items()]
        reasons += [f"{name}: its role is not known" for name in report.not_judged]
        raise ValueError(
            f"vardrop.set_rates_: the model must have a dropout for one of {', '.join(asked)}, got none that could be "
            f"set. {'; '.join(reasons[:5]) or 'It has no dropout at all'}"
        )
    for site, new in plan:
        report.set[site.name or site.kind] = site.rate, new
        _set(site, new)
    wanted = {role: rate for role, rate in asked.items() if not callable(rate)}
    now = roles.sites(model)
    for place in fields:
        common = config_fields.common_rate(place, now, wanted)
        if isinstance(common, str):
            report.skipped[place.name] = common
            continue
        before = place.rate
        try:
            setattr(place.config, place.field, common)
        except Exception as error:  # a config may check what it is given, and has its own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            report.skipped[place.name] = f"does not take {common:g}: {reason}"
        else:
            report.set[place.name] = before, common
    return report


def _plan(found: list[Site], asked: dict[str, RateOfLayer], report: RatesReport) -> Iterator[tuple[Site, float]]:
    """What to set to what; rates are checked before any is set."""
    for role, rate in asked.items():
        chosen = [site for site in found if site.role == role]
        layers = list(dict.fromkeys(site.layer for site in chosen))
        for site in chosen:
            new = rate(layers.index(site.layer), len(layers)) if callable(rate) else rate
            new = checked_rate(new, f"set_rates_({role}=)", one=getattr(site.owner, "one", True))
            reason = _why_not(site, new)
            if reason is None:
                yield site, new
            elif reason:
                report.skipped[site.name] = reason


def _why_not(site: Site, new: float) -> str | None:
    """Why a rate is not set; empty if there is nothing to set."""
    if site.owner is None:
        if new == 0:
            return ""
        return None if _new(site, new) else "was built without this dropout; build the model with its rate above 0"
    if isinstance(site.owner, nn.RNNBase) and site.owner.num_layers == 1 and new > 0:
        return "has one layer, and drops between layers only"
    if isinstance(site.owner, Rated) and site.owner.is_learned:
        return "has a learned rate; its p = ... sets where the rate is now"
    if isinstance(site.owner, Rated) and site.owner.schedule is not None:
        return "follows a schedule, whose next step would set it again"
    if site.owner is not None and is_off(site.owner):
        return "is switched off, as vd.convert_ has put its noise on the weights; vd.restore_ them first"
    return None


def _set(site: Site, new: float) -> None:
    if site.owner is not None:
        setattr(site.owner, site.attribute, new)
    elif site.holder is not None:
        layer = _new(site, new)
        device = next((p.device for p in site.holder.parameters()), None)
        if layer is not None:
            setattr(site.holder, site.name.rpartition(".")[2], layer.train(site.holder.training).to(device))


_BLOCKS = ((nn.Conv1d, DropBlock1d), (nn.Conv2d, DropBlock2d), (nn.Conv3d, DropBlock3d))


def _new(site: Site, p: float) -> nn.Module | None:
    """A layer for an empty place; None where it is not certain which."""
    if site.role == "path" and re.search(r"drop_path\d*$", site.name):
        return DropPath(p)
    if site.role == "block" and site.kind == "Identity" and site.holder is not None:
        kinds = [block for conv, block in _BLOCKS if any(isinstance(child, conv) for child in site.holder.children())]
        if len(kinds) == 1 and re.search(r"drop_block\d*$", site.name):
            return kinds[0](p)
    return None
