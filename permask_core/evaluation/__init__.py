"""What trained networks do: lines between them, how they differ, whom they serve, and statistics over seeds."""
