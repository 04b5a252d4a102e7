"""Guessing a sequence's next tokens, so that one step of the model may check several at once."""
