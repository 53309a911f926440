"""`shmsock bench`: what is measured, over what, and how it is told."""
