"""The sweep of trials on Ray Tune, and the results that it leaves behind."""
