"""``vardrop diagnose``, which `vardrop.cli` mounts. What takes long to import comes inside."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

_HOW = "How it is looked at"


def diagnose(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:factory, a function that makes it, or a RUN.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="digits, mnist, ..., FILE.csv, or FILE.npz with x and y; a run has its own."
        ),
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(
            metavar="STRATEGY", help="auto | recalibrate | lower_rate | uniform | move | layernorm: try a cure as well."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For diagnosis.html, diagnosis.json, and the cured weights.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A state dict for the model: .pt or .safetensors.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a batch.", rich_help_panel=_HOW)] = 128,
    batches: Annotated[int, typer.Option(help="At most so many.", rich_help_panel=_HOW)] = 16,
    seed: Annotated[int, typer.Option(help="Of the noise, and of the rows set aside.", rich_help_panel=_HOW)] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(help="Look for data here first; then $VARDROP_DATA, ./data, the user's cache.")
    ] = None,
) -> None:
    """Tell what dropout does to a model: its quarrel with BatchNorm, and where it stands.

    A model of your own, with trained weights, on a named set:

    `vardrop diagnose mypackage.nets:resnet --weights resnet.pt --data cifar10 --out diagnosis`

    Try every cure, and keep the best on rows that were set aside:

    `vardrop diagnose mypackage.nets:resnet --data cifar10 --fix auto --out diagnosis`

    A run that `vardrop train` has left behind:

    `vardrop diagnose runs/first`

    With --fix and --out, cured.pt has the state dict of the cured model; diagnosis.json says what was changed in it.
    """
    import json
    import sys

    import torch

    from vardrop.diagnosis.diagnose import diagnose as look
    from vardrop.diagnosis.fixes.fix import fix_variance_shift_
    from vardrop.diagnosis.record import record
    from vardrop.diagnosis.targets import load_weights, target
    from vardrop.evaluation.output import make_ready, save
    from vardrop.report.diagnosis import write_diagnosis

    if batch_size < 2 or batches < 1:
        raise ValueError(
            f"vardrop.diagnose: --batch-size must be 2 or more and --batches 1 or more, got {batch_size} and {batches}"
        )
    if out is not None:
        make_ready(out)
    found = target(model, data, seed, data_dir)
    if weights is not None:
        load_weights(found.model, weights)
    count = batch_size * batches
    order = torch.randperm(len(found.training[0]), generator=torch.Generator().manual_seed(seed))[:count]
    loader = list(zip(*(rows[order].split(batch_size) for rows in found.training), strict=True))
    held = found.validation
    validation = None if held is None else list(zip(*(rows[:count].split(batch_size) for rows in held), strict=True))
    noise = torch.Generator().manual_seed(seed)
    diagnosis = look(
        found.model, loader, loss_fn=found.loss_fn, validation=validation, max_batches=batches, generator=noise
    )
    sys.stdout.write(f"{diagnosis}\n")
    cured = None
    if fix is not None:
        cured = fix_variance_shift_(
            found.model,
            loader,
            fix,  # type: ignore[arg-type]
            validation=validation,
            metric=found.loss_fn,
            max_batches=batches,
            generator=noise,
        )
        sys.stdout.write(f"{cured}\n")
    if out is None:
        return
    command = ["vardrop", "diagnose", model, *(["--data", data] if data else []), *(["--fix", fix] if fix else [])]
    command += [*(["--weights", str(weights)] if weights else []), "--batch-size", str(batch_size)]
    command += ["--batches", str(batches), "--seed", str(seed)]
    result = record(diagnosis, cured, model=found.name, data=found.data, command=shlex.join(command))
    save(out / "diagnosis.json", json.dumps(result, indent=1, allow_nan=False).encode())
    page = write_diagnosis(result, out / "diagnosis.html")
    if cured is not None and cured.chosen is not None:
        torch.save(found.model.state_dict(), out / "cured.pt")
        sys.stdout.write(f"cured weights: {out / 'cured.pt'}\n")
    sys.stdout.write(f"page: {page}\n")
