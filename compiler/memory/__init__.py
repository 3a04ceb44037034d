"""`sdc plan`: what a bundle takes in memory for a picture, before it runs."""
