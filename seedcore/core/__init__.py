"""The rules: values, lifecycle, leases, batches, selection. Standard library only."""
