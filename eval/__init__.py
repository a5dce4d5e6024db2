"""Evaluation: frozen features in, rows of numbers (JSON lines) out, then tables and pictures."""
