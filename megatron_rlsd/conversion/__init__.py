"""The offline converter between Hugging Face folders and Megatron checkpoints."""
