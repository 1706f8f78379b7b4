"""Converts released weights into models of this project."""
