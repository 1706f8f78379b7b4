"""The team's servers without containers, and the drill that runs on them."""
