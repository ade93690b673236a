"""Instruction data: sources, conditions and encoding."""
