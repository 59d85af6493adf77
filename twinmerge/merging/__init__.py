"""Offline: tensors in, tensors out. No model classes."""
