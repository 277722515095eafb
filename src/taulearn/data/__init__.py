"""Named data sets as tensors: `load("mnist")` gives a pair of inputs and targets; so does `load("mine.npz")`.

`names()` lists them, `register` adds one of your own, `describe()` says where their files lie, `fetch` downloads,
`verify` checks the files.
"""

from .catalog import (
    Description as Description,
    describe as describe,
    fetch as fetch,
    load as load,
    names as names,
    register as register,
    verify as verify,
)
from .files import DataError as DataError
from .samples import DataSet as DataSet, Generated as Generated, Samples as Samples
