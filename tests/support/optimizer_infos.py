"""Our optimizers, described to torch's own tests as torch describes its own."""

from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from tests.support.arms import OPTIMIZERS

# Its import forbids everybody in this process to set flags of torch.backends, as Lightning does.
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

CPU = torch.device("cpu")


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """The table that torch has for AdamW, without what we do not have, and some of our options."""
    table: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "few steps": {"precondition_frequency": 3, "shampoo_beta": 0.5},
        "blocks": {"max_precond_dim": 4, "large_dims": "blocks"},
    }
    return [OptimizerInput(None, {**kwargs}, desc) for desc, kwargs in table.items()]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """torch's own of all optimizers, with our words where we find it first, and Adam's."""
    words = {"Tensor lr must be 1-element": "lr must be a number >= 0, or a one-element tensor"}
    found = get_error_inputs_for_all_optims(device, dtype)
    for one in found:
        one.error_regex = words.get(one.error_regex, one.error_regex)
    ours: dict[str, dict[str, Any]] = {
        "betas": {"lr": 1e-2, "betas": (1.0, 0.0)},
        "weight_decay": {"lr": 1e-2, "weight_decay": -1},
        "lr": {"lr": -1.0},
        "eps": {"eps": -1.0},
        "betas, tensor second": {"lr": 1e-2, "betas": (0.9, torch.tensor(0.99))},
        "betas, tensor first": {"lr": 1e-2, "betas": (torch.tensor(0.9), 0.99)},
    }
    return found + [
        ErrorOptimizerInput(
            OptimizerInput(None, kwargs, desc),
            error_type=ValueError,
            error_regex=desc.split(",")[0],
        )
        for desc, kwargs in ours.items()
    ]


INFOS = [
    OptimizerInfo(
        optimizer,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
            [
                lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
                lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
            ],
            [lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=4)],
        ),
        supported_impls=(),
        not_og_supported_flags=("maximize", "stochastic_rounding", "batch_dims", "young_stride"),
        has_capturable_arg=False,
        supports_sparse=False,
        supports_complex=False,
    )
    for optimizer in OPTIMIZERS.values()
]
