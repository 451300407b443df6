"""Noise on what clients send, what it is worth (epsilon), and attacks on what they and the server send."""
