"""Embedding, search and serving with a trained model."""
