"""One step of a model: token ids and KV slots in, logits out. Nothing here knows of requests, text or sampling."""
