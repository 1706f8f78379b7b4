"""What runs flows: processes, servers, launchers, DVC."""
