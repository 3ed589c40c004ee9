"""Beginning an optimizer's state anew: how, and a rehearsal that it then goes on like a new one."""
