"""The runtime of flows: processes, servers, launchers and DVC."""
