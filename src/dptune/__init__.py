"""Differentially private parameter-efficient fine-tuning of language models."""
