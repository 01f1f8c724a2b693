"""What several routers are made of; each file says which. Mechanisms of one router stand in its own file."""
