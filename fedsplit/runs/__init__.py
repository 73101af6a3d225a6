"""Runs: what composes both sides, and keeps a folder of what came of it."""
