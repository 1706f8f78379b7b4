"""Sweeps: grids of trials over parameters, each run in its own checkout."""
