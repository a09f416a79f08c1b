"""Hugging Face folders: configuration, heads, packed models, tokenizers. Nothing else reads them."""
