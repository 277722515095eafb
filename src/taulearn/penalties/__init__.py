"""Penalties on time steps, weights, biases and intermediate outputs.

    L1                 alpha norm(tau)_1                                                    [2], section 3
    L2                 weight norm(tau)_2^2
    ElasticNet         (weight/2) (norm(tau)_2^2 + norm(tau)_1)                             [1], section 5
    TimeHorizon        (weight/2) (T - sum tau)^2                                           [2], section 3
    WeightElasticNet   (weight/2) sum_l (norm(W_l)_F^2 + norm(W_l)_1 + the same of b_l)     [1], equation (2.4)
    GroupLasso         weight sum_l norm((W_l, b_l))_2
    BiasOrdering       (beta/2) sum_l sum_j max(0, b_j - b_{j+1})^2                         [1], section 7
    StageCost          weight sum_{k<N} loss(yhat_k)                                        [3]
    Distillation       weight T^2 KL(teacher || model), and the mean square of hidden states [4]

Called as ``penalty(model, inputs, targets, states)``; ``fit`` adds the values to the data loss and records each.

References:
    [1] Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks.
    [2] Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning.
    [3] Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
    [4] Hinton, Vinyals, Dean (2015), Distilling the knowledge in a neural network.
"""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from ..depth.distillation import Distillation as Distillation
    from ..depth.stage_cost import StageCost as StageCost
    from ..nn.time_steps import time_steps_of as time_steps_of
    from .base import Penalty as Penalty
    from .steps import L1 as L1, L2 as L2, ElasticNet as ElasticNet, TimeHorizon as TimeHorizon
    from .weights import BiasOrdering as BiasOrdering, GroupLasso as GroupLasso, WeightElasticNet as WeightElasticNet

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "..depth.distillation": ("Distillation",),
        "..depth.stage_cost": ("StageCost",),
        "..nn.time_steps": ("time_steps_of",),
        ".base": ("Penalty",),
        ".steps": ("L1", "L2", "ElasticNet", "TimeHorizon"),
        ".weights": ("BiasOrdering", "GroupLasso", "WeightElasticNet"),
    },
)
