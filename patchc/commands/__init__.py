"""What the commands of the `patchc` command line do, a module each. Below `cli`, above everything else."""
