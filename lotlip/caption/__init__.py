"""Stage `caption`: long captions for every image."""
