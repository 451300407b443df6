"""Item features from images and titles, made offline: `python -m fedjax_rec.encoders`, extra `encoders`.

The simulator never imports this package. torch, transformers and open_clip are imported by `clip` and `bert` only.
"""
