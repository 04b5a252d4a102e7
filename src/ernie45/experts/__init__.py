"""Routed experts that lie on disk and are in memory while they are used."""
