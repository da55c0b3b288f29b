"""Everything asynchronous: slots, host store, transfers, the executor that runs a plan."""
