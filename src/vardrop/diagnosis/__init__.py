"""What dropout does to the rest of a network: its quarrel with BatchNorm, its placement, its equivalent penalty."""
