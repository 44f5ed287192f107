"""`import vardrop` loads torch and nothing heavier."""

from __future__ import annotations

import subprocess
import sys

import pytest


def packages_after(statement: str) -> set[str]:
    """The top-level packages outside the standard library that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in list(sys.modules)}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) - sys.stdlib_module_names


@pytest.fixture(scope="module")
def with_torch() -> set[str]:
    return packages_after("import torch")


def test_import_loads_torch_and_nothing_else(with_torch: set[str]) -> None:
    assert packages_after("import vardrop") - with_torch == {"vardrop"}


def test_using_the_core_loads_nothing_else(with_torch: set[str]) -> None:
    use = (
        "import torch, vardrop as vd; layer = torch.nn.Linear(2, 2); vd.convert_(layer, vd.VariationalDropout());"
        "vd.ELBO(layer, num_data=10)(layer(torch.ones(1, 2)).sum()).backward(); vd.dropout_rates(layer)"
    )
    assert "vardrop" in packages_after(use)
    assert not packages_after(use) & {
        "lightning_fabric",
        "sklearn",
        "plotly",
        "typer",
        "rich",
        "matplotlib",
        "pandas",
        "scipy",
    }


def test_the_check_can_fail(with_torch: set[str]) -> None:
    assert "pytest" in packages_after("import vardrop, pytest") - with_torch
