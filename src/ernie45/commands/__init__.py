"""What the command line does beside running models: converting checkpoints, and verifying them."""
