"""What the routers do, as pictures and tables."""
