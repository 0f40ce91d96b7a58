"""Benchmarks of tiger_db. Each compares with the same work in plain asyncpg, in the same run."""
