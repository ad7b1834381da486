"""What is run: a distillation, a fine-tuning, and many distillations compared."""
