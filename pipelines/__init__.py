"""Decoding with DALI: workers make mini clips from clip requests, and a DALI graph decodes batches of them."""
