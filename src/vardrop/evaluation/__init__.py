"""What a finished run is worth where it counts: predictions with their uncertainty, and how far they can be trusted."""
