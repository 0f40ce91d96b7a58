"""What tiger_db costs, each figure beside the same work in plain asyncpg in the same run."""
