"""What all four roles of Baton share. Holds no code of its own: import the module you need."""
