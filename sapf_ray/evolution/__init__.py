"""Private Evolution: the family without fine-tuning.

Four replaceable parts, cut as in Microsoft's library: ``api`` makes images, ``embedding`` compares
them, ``histogram`` lets records vote under DP, ``population`` selects and breeds;
``sapf_ray.evolution.evolve.Evolution`` puts them together. PE and Aug-PE are two rows of
``sapf_ray.methods``.
"""
