"""Whether a network that was trained knows more than a guess: the noise can take over all of it in silence."""

from __future__ import annotations

import torch

from vardrop.data import Data


def error_of_guessing(data: Data) -> float:
    """The test error (classification) or RMSE of an answer that is always the same and the best for training.

    Example:
        >>> from vardrop.data import load
        >>> from vardrop.training.guessing import error_of_guessing
        >>> round(error_of_guessing(load("digits")), 2)
        0.9
    """
    if data.task == "regression":
        return float((data.test_y.double() - data.train_y.double().mean(0)).square().mean().sqrt())
    most = torch.bincount(data.train_y).argmax()
    return float((data.test_y != most).double().mean())


def notes(data: Data, mistake: float, learned: bool) -> list[str]:
    """What a user should know of a network with this test error, in sentences.

    Args:
        data: what it was trained and tested on.
        mistake: its test error or RMSE.
        learned: whether its rates were learned.
    """
    guess = error_of_guessing(data)
    if not mistake >= 0.99 * guess:
        return []
    why = (
        "; noise that is learned can take over all of a network where data are few for its weights: give it a longer "
        "--warmup, a smaller --kl-scale or --model, or more data"
        if learned
        else "; train longer, or with another learning rate"
    )
    return [f"It does no better than a guess: {mistake:.4g}, and {guess:.4g} by always giving the same answer{why}."]
