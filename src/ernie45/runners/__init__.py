"""Requests to token events. The local runner is our engine; others may drive another one."""
