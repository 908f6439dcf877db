"""Data: where pictures lie and how they are read, tables that stages pass on, shards, order, crops, masks."""
