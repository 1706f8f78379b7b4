"""Language-image pre-training that understands long text (LoTLIP, NeurIPS 2024)."""

import os

__version__ = "0.1.0"

# There may be no internet, and nobody asked to be counted: the libraries' telemetry is off unless it was set otherwise.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(_name, _value)

# Threads that wait for work spin, by default for long: beside any other program on the same cores, training was 8 times
# slower for it (80 against 620 samples/s on two cores), and no faster alone.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
