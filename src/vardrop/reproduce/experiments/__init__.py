"""The experiments, written out: a new one is a file here and a line in this list."""

from vardrop.reproduce.experiment import Experiment
from vardrop.reproduce.experiments import (
    active,
    compact,
    convergence,
    data_size,
    dropblock,
    droppath,
    figure1a,
    figure1a_longer,
    figure1b,
    glm,
    kl,
    no_tuning,
    ood,
    sparse_cifar,
    sparse_lenet_5,
    sparse_lenet_300_100,
    speed,
    table1,
    table1_correlated,
    uci,
    variance_scaling,
    variance_shift,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        kl.EXPERIMENT,
        speed.EXPERIMENT,
        table1.EXPERIMENT,
        table1_correlated.EXPERIMENT,
        convergence.EXPERIMENT,
        variance_scaling.EXPERIMENT,
        ood.EXPERIMENT,
        active.EXPERIMENT,
        glm.EXPERIMENT,
        dropblock.EXPERIMENT,
        droppath.EXPERIMENT,
        data_size.EXPERIMENT,
        uci.EXPERIMENT,
        variance_shift.EXPERIMENT,
        figure1a.EXPERIMENT,
        figure1a_longer.EXPERIMENT,
        figure1b.EXPERIMENT,
        no_tuning.EXPERIMENT,
        sparse_lenet_300_100.EXPERIMENT,
        sparse_lenet_5.EXPERIMENT,
        sparse_cifar.EXPERIMENT,
        compact.EXPERIMENT,
    )
}


def chosen(name: str) -> list[Experiment]:
    """The experiment of a name, or every one for ``"all"``.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "all":
        return list(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise ValueError(f"vardrop.reproduce: experiment must be all or one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return [EXPERIMENTS[name]]
