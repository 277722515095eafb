"""The parts of the suite puettschneider2025: members, what is measured on them, judges, figures, tables."""
