"""Mixtures of experts: a router, rows by expert, their products, and what crosses devices."""

from jaxgpt.model.experts.mixture import Experts

__all__ = ["Experts"]
