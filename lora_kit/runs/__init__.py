"""Trainings and sweeps as their files show them from outside: read only, without torch."""
