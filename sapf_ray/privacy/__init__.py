"""Privacy: plan, accountants, ledger, secret streams, sampling, clipping, noise, privacy card."""
