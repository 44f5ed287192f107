"""Cures of the variance shift, one file each: what they change, and nothing about whether it helps."""
