"""Charts, heat maps over images, and confidence intervals."""
