"""Fewer layers while training: criteria estimate, rules mark, a transaction deletes; policies say when.

The public names are ``taulearn.prune``, ``Pruning``, ``PruneReport``, ``Criterion`` and ``contribution``.
Nothing is imported here, as other rooms rest on the transaction alone.
"""
