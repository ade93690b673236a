"""Differential privacy of fine-tuning: plan, sampling, mechanism and accounting.

Imports nothing else of dptune and could stand alone. The modules are imported by name; those of the plan and
of accounting do without torch.
"""
