"""The layer below the model: errors, device meshes, the hosts of a job, transfers and files."""
