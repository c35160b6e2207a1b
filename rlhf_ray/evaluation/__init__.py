"""Playing greedily, judging, comparing with schedules that learn nothing."""
