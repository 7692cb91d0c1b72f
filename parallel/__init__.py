"""Many processes: functions from ops to ops (lasp, experts), from a model to a sharded one (shard); what they need."""
