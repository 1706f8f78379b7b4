"""A page to look at a model with: texts find pictures, pictures find texts, and maps show what was looked at."""
