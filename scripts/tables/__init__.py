"""What the scripts of tables share: networks that are made once, figures that are measured once."""
