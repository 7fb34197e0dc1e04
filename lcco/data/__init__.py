"""Image sets: readers, the one decoder of pictures, the group sampler, the check of a folder."""
