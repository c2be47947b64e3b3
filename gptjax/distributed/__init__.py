"""Distribution over devices and processes: meshes and sharding rules, multi-process jobs, parameter trees."""
