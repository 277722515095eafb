"""Three papers on learned time steps, reproduced: their trainings, statistics, claims and figures, a folder for each.

``taulearn reproduce NAME`` finds the suites through the entry points ``taulearn.suites``, ``--engine NAME`` the engines
vmap and ray through ``taulearn.engines``.
"""

__version__ = "0.1.0"
