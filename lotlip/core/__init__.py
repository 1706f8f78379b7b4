"""Files, locks, processes and checks: infrastructure that cannot change a result."""
