"""Training: ``fit``, the record, checkpoints and run folders."""

from .events import Diverged as Diverged
from .events import EpochEnd as EpochEnd
from .events import Interrupted as Interrupted
from .events import StopTraining as StopTraining
from .fit import fit as fit
from .history import Deletion as Deletion
from .history import History as History
from .metrics import accuracy as accuracy
from .metrics import evaluate as evaluate
from .run import Run as Run
