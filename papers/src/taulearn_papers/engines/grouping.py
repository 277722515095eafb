"""Which members can be trained at once, and which of them together."""

from collections.abc import Iterable

from .. import parts
from ..suite import Member

MOST = 128
"""Members in one group, which bounds memory."""


def grouped(members: Iterable[Member]) -> list[list[Member]]:
    """Members that differ in seed and learning rates alone, at most MOST together, in the order of their first ones.

    Args:
        members: Any members.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> members = [Member("a", seed, TrainConfig(seed=seed)) for seed in (0, 1)]
        >>> [len(group) for group in grouped([*members, Member("b", 0, TrainConfig(width=8))])]
        [2, 1]
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(_structure(member), []).append(member)
    return [group[start : start + MOST] for group in groups.values() for start in range(0, len(group), MOST)]


def _structure(member: Member) -> str:
    if member.config is None:
        return member.name
    return member.config.model_dump_json(exclude={"seed", "lr", "tau_lr", "run", "overwrite", "checkpoint_every"})


def why_alone(member: Member) -> str | None:
    """Why a member is not trained together with others, or None.

    Args:
        member: The member.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> why_alone(Member("a", 0, TrainConfig(optimizer="adam")))
        'its optimiser is not plain SGD'
    """
    config = member.config
    if config is None:
        return "it only measures"
    reasons = {
        "its optimiser is not plain SGD": config.optimizer.lower() != "sgd" or config.momentum > 0,
        "its learning rate is scheduled": config.scheduler != "none",
        "its gradients are clipped": config.clip_norm is not None,
        "its batches are split": config.accumulate != 1,
        "it has mixed precision": config.precision == "bf16",
        "its weights are averaged": config.average_weights,
        "it writes events for TensorBoard": config.tensorboard,
        "it has a stage cost": bool(config.stage_cost) or config.depth_losses,
        "its network keeps statistics of batches": config.network == "resnet-v2",
        "its stage cost changes over training": config.stage_cost_schedule != "constant",
    }
    policy = parts.make_pruning(config)
    if policy is not None:
        reasons["its pruning looks at more than its steps"] = policy.targeted or policy.criterion is not None
    return next((reason for reason, holds in reasons.items() if holds), None)
