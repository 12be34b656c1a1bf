"""What a program costs on chips that are not here: chip figures, the real programs' shapes, compiled HLO, counts."""
