"""What trains: the image tower of the demo, and the text tower through DeepSpeed."""
