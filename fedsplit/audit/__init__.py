"""Attacks on what has left, as strong as an attacker's, and their scores."""
