"""What objectives are made of: losses of language models, and what a run takes from its objective
besides (data, batches, evaluation, models and parameters of its own)."""
