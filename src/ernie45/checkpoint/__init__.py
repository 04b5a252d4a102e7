"""Checkpoint files: where they are (resolve, hub), what they hold (headers), and their bytes (read).

Only `read` imports torch.
"""
