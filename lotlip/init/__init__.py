"""Configures the pipeline for own data: `lotlip init`."""
