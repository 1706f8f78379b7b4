"""Writes models of this project in the layouts of other libraries: one file for each format."""
