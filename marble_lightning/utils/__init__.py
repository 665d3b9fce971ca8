"""What every part uses: checks of settings, seeds, files that are whole, images, processes."""
