"""Stage `caption`: writes long captions for every image."""
