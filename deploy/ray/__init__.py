"""Parts of `deploy.ray_cluster`: where processes go on a Ray cluster, and how they are watched."""
