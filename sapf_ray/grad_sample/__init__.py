"""Per-sample gradients and their norms: what selection and fine-tuning both stand on."""
