"""From raw tables and images to pairs.parquet, to chat rows, to what a processor takes."""
