"""Decisions: which sizes the next step has, and why.

Standard library only: no torch, no clock, no rank, no I/O. Time, memory and gradient statistics
come in as numbers; so every decision can be tested without a machine, and every rank that is told
the same facts decides the same. The engine calls `steering` and nothing else.
"""
