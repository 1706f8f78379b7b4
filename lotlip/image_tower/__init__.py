"""Stage `image-tower`: the pretrained image tower."""
