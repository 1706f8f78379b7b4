"""Black-box drills: kills, full disks, flipped bits and two runs at once, each followed by the same command again."""
