"""The U-Net, its layers, and its initialisation."""
