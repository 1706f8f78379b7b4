"""One flow for each stage."""
