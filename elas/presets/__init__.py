"""Shipped configurations, by name: `elas train --config 60m`."""
