"""Time steps around the blocks of an existing model.

state          which tensor of a block's arguments and output is the state
blocks         a block with a time step; its placeholder where a deleted block's place must stay
units          steps in units of displacement
folding        plain steps from units, and ones in the end
probe          a forward pass that records the calls of all modules
find_blocks    which of the modules are blocks, and why the others are none
state_path     what the host does with the states between its blocks
noise          values in place of constant parameters, for passes that show what a host does
trial          deletions tried on example inputs
observation    forward passes of the trial, compared
stages         outputs of a wrapped model cut after each block
structure      taking blocks out of lists and other holders
configurations configurations and layer numbers of Hugging Face transformers, which follow a deletion
save_pretrained   what it writes, plain loading loads as the same model
names          names and patterns of modules
host           what a wrapped model keeps, and what pruning asks of it
api            the public functions
"""

from .block import PassThrough as PassThrough
from .folding import anneal_to_one as anneal_to_one, fold_units as fold_units
from .wrap_model import unwrap as unwrap, wrap as wrap
from .wrapped_model import Wrapping as Wrapping, wrapping_of as wrapping_of
