"""Who runs what, when: claims jobs for free slots and leads each through its life."""
