"""Log order to timestamp order, without I/O: what the replicator and `milvus_cdc.follow` share."""
