"""Parts of :mod:`jobs.pretrain_public`."""
