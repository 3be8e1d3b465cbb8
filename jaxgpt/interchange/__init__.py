"""Weights from and to other programs' folders: Hugging Face's, and OpenAI's own GPT-2."""
