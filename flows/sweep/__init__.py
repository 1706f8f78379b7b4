"""Sweeps: trials over parameters, each in a checkout of its own."""
