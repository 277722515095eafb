"""Trainings described by their settings: read, checked, built, run, resumed, many at once; and the command line."""
