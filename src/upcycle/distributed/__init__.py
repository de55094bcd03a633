"""Devices, and which of them a process computes on."""
