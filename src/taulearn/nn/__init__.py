"""Networks with learned time steps: the steps, the four schemes, the network, the builders of the papers."""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from .activations import (
        SmoothReLU as SmoothReLU,
        activation_names as activation_names,
        make_activation as make_activation,
    )
    from .builders import (
        FlattenInput as FlattenInput,
        FullyConnected as FullyConnected,
        densenet as densenet,
        feedforward as feedforward,
        fractional_dnn as fractional_dnn,
        resnet as resnet,
    )
    from .constraints import Constraint as Constraint
    from .convolutional import (
        ConvolutionalStem as ConvolutionalStem,
        PooledHead as PooledHead,
        PreActivationBlock as PreActivationBlock,
        resnet_v2 as resnet_v2,
    )
    from .early_exit import Prediction as Prediction
    from .integrators import (
        Heun as Heun,
        LocalScheme as LocalScheme,
        Midpoint as Midpoint,
        Momentum as Momentum,
        RungeKutta as RungeKutta,
        RungeKutta4 as RungeKutta4,
        Verlet as Verlet,
    )
    from .learned_order import FractionalLearned as FractionalLearned, LearnedOrder as LearnedOrder
    from .module_on_states import apply_to_each as apply_to_each
    from .network import TimeVariableNetwork as TimeVariableNetwork
    from .schemes import (
        Dense as Dense,
        Feedforward as Feedforward,
        Fractional as Fractional,
        Residual as Residual,
        Scheme as Scheme,
    )
    from .skips import (
        ComposedSkips as ComposedSkips,
        IdentitySkips as IdentitySkips,
        PadSkips as PadSkips,
        Skips as Skips,
        learned_skips as learned_skips,
    )
    from .structured_layers import Antisymmetric as Antisymmetric, Symmetric as Symmetric
    from .time_steps import TimeSteps as TimeSteps

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        ".activations": ("SmoothReLU", "activation_names", "make_activation"),
        ".builders": ("FlattenInput", "FullyConnected", "densenet", "feedforward", "fractional_dnn", "resnet"),
        ".constraints": ("Constraint",),
        ".convolutional": ("ConvolutionalStem", "PooledHead", "PreActivationBlock", "resnet_v2"),
        ".integrators": ("Heun", "LocalScheme", "Midpoint", "Momentum", "RungeKutta", "RungeKutta4", "Verlet"),
        ".learned_order": ("FractionalLearned", "LearnedOrder"),
        ".module_on_states": ("apply_to_each",),
        ".early_exit": ("Prediction",),
        ".network": ("TimeVariableNetwork",),
        ".schemes": ("Dense", "Feedforward", "Fractional", "Residual", "Scheme"),
        ".skips": ("ComposedSkips", "IdentitySkips", "PadSkips", "Skips", "learned_skips"),
        ".structured_layers": ("Antisymmetric", "Symmetric"),
        ".time_steps": ("TimeSteps",),
    },
)
