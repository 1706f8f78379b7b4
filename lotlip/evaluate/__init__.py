"""Scores: metrics as pure functions, benchmarks as readers, and the protocol that goes with them."""
