"""Black-box drills: kills, full disks, flipped bits and concurrent runs, each followed by the same command again."""
