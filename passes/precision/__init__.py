"""Q/DQ pairs and float16, and what calibration measures."""
