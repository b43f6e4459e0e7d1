"""diskchain: snapshots of real VMs as real qcow2 overlay chains."""
