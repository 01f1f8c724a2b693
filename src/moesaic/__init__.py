"""moesaic: Mixture-of-Experts for PyTorch and HF Transformers under one layer contract."""
