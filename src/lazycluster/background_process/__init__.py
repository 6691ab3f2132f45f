"""The process of a cluster in the background: started by `lazycluster.background.launch`, used by nothing else."""
