"""What the methods of speculative decoding claim, measured."""
