"""A folder of images as a person has it: found, checked by file, labelled."""
