"""Models on disk: model.safetensors with the weights, model.json with what it takes to rebuild the model. Never pickle.

A network is rebuilt from the function of this package that built it and its arguments, the numbers of the layers that
were kept, its scheme and its time steps (:mod:`taulearn.saving.recipe`). Every other model needs a host.
"""

from .load import load_model as load_model
from .save import save_model as save_model

__all__ = ["load_model", "save_model"]
