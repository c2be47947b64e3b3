"""Many devices and many processes: meshes and sharding rules, the job's processes, parameter trees."""
