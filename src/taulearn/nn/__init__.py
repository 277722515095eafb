"""Networks with learned time steps: the steps, the four schemes, the network, the builders of the papers."""

from .activations import SmoothReLU as SmoothReLU
from .activations import activation_names as activation_names
from .activations import make_activation as make_activation
from .builders import FlattenInput as FlattenInput
from .builders import FullyConnected as FullyConnected
from .builders import densenet as densenet
from .builders import feedforward as feedforward
from .builders import fractional_dnn as fractional_dnn
from .builders import resnet as resnet
from .network import TimeVariableNetwork as TimeVariableNetwork
from .schemes import Dense as Dense
from .schemes import Feedforward as Feedforward
from .schemes import Fractional as Fractional
from .schemes import Residual as Residual
from .schemes import Scheme as Scheme
from .skips import ComposedSkips as ComposedSkips
from .skips import IdentitySkips as IdentitySkips
from .skips import PadSkips as PadSkips
from .skips import Skips as Skips
from .skips import learned_skips as learned_skips
from .time_steps import TimeSteps as TimeSteps
