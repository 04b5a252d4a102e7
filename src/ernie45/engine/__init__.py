"""Runs requests on a backend: who gets a KV slot, what the next step computes, where tokens go. Ids, never text."""
