"""Report generation and visual question answering: QLoRA on image-text decoders through TRL."""
