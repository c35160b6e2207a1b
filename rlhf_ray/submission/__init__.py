"""From this machine to a cluster: what is uploaded, what runs there, and what comes back."""
