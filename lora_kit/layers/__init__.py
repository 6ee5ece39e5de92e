"""Wrappers around one frozen base layer each. They know slots and routing; names, configs and files are the bank's.

A layer keeps, for everything an adapter may bring to it, one stacked tensor whose first axis is the slot. Slot 0 is
"no adapter", and every slot holds zero or the base's own values until an adapter is put there, so any slot may be
routed to any layer.
"""
