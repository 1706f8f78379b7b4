"""Drawing: charts, overlays, intervals."""
