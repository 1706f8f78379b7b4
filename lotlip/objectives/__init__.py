"""Training objectives: how texts and images are contrasted."""
