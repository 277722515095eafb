"""The parts of the suite herberg2023: members, judges, figures."""
