"""A policy's responses to prompts, and what they are worth."""
