"""Memory and time of a training run, estimated before it starts."""
