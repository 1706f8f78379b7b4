"""Language-image pre-training that understands long text (LoTLIP, NeurIPS 2024)."""

import os
from importlib import import_module
from typing import Any

from lotlip.core.loopback import bypass_proxies

__version__ = "0.1.0"

# Turns the telemetry of libraries off, unless the environment sets it: there may be no internet access.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

bypass_proxies()

# Threads that wait for work spin, by default for long: beside any other program on the same cores, training was 8 times
# slower for it (80 against 620 samples/s on two cores), and no faster alone.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Importing this package is quick: torch and transformers come when one of these is first used. Where the caller brings
# transformers, before or after, its Auto classes know the model (`lotlip._auto`).
_LAZY = {
    "LotlipConfig": "lotlip.models.configuration",
    "LotlipModel": "lotlip.models.lotlip",
    "LotlipProcessor": "lotlip.models.processing",
}
__all__ = [*_LAZY, "__version__"]

# Before any library looks for it.
import_module("lotlip.core.home").ensure_home()
import_module("lotlip._auto")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lotlip' has no attribute {name!r}")
