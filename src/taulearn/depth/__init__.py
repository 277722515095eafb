"""The network cut after k of its layers: its outputs, their cost in training, early exit, truncation, profiles.

The public names are ``taulearn.truncate``, ``taulearn.penalties.StageCost`` and those of ``taulearn.diagnostics``.
"""
