"""The data that stages pass on. Frozen, without tensors, spans outside equality; below every stage but diagnostics."""
