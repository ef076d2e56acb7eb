"""The mathematics of a block, pure: tensors in, tensors changed in place, nothing remembered."""
