"""What a compile does, a file for each stage; compile.py says in which order."""
