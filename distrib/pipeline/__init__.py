"""Pipelines: schedules as data, what checks and simulates them, and what runs them."""
