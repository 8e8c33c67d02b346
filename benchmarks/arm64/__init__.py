"""``make check-arm64``: the same artifact on other processors' instructions, its answers compared."""
