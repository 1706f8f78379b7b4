"""Files, locks, processes, checks: what cannot change a result."""
