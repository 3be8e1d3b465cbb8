"""From raw text to an exactly replayable stream of token batches."""
