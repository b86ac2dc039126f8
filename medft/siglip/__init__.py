"""Alignment and retrieval: LoRA on SigLIP with a contrastive trainer."""
