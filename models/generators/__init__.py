"""Generators of public images: the prior knowledge of attacks that search a latent instead of pixels."""
