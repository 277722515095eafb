"""Engines that only suites need: many networks at once (vmap), many machines (ray)."""
