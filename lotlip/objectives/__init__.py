"""Training objectives, which contrast texts and images."""
