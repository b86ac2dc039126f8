"""From raw tables and pictures to pairs.parquet, to chat rows, to what a processor takes."""
