"""The loop form: a training loop that a person already has, read as a tree, planned, rewritten.

Standard library only: no torch, no IPython; nothing here runs a person's code.
"""
