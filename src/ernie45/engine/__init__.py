"""Runs requests on a backend: who gets a KV slot, what is computed in the next step, where each token goes. Ids only, never text."""
