"""Many processes: functions from ops to ops (lasp), from a model to a sharded model (shard), and what they stand on."""
