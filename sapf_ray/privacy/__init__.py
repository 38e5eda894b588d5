"""Privacy: plan, accountants, ledger, secret streams, sampling, clipping and noise, privacy card."""
