"""The parts of the suite antil2022: members, what is measured on them, judges, figures, tables."""
