"""Any of the programs on a cluster: jobs through submitit, pipelines of them, and a look at how they are."""
