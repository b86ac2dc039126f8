"""From raw tables and images to pairs.parquet, chat rows and processor inputs."""
