"""Report generation and visual question answering: QLoRA on Llama 3.2 Vision through TRL."""
