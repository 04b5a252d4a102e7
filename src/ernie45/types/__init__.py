"""Plain frozen values that travel between the layers. No torch, no behaviour beyond validation."""
