"""Machines: launchers, collectives, agreement between ranks, random numbers, engines."""
