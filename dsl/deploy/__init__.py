"""Deployments and what they stand on: syntax, checks, and what they mean (``typed``)."""
